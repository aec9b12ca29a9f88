"""Records of a run as JSON lines: a full disk loses none when they are written, a cut line is skipped when read."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lrnn.errors import UserError

HELDOUT_OF_CORPUS = "heldout_loss/"  # begins the keys of held-out losses of single corpora


class DurableLines:
    """Append lines to a file. Lines that the storage refuses are kept in memory and written with the next line."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        # After a crash the last line may be cut; the next one must not become part of it.
        cut = path.exists() and not _ends_with_newline(path)
        self._pending = bytearray(b"\n" if cut else b"")

    def write(self, line: str) -> OSError | None:
        """Append a line.

        Returns:
            The error that kept it from the file, or None.
        """
        self._pending += line.encode() + b"\n"
        try:
            if self._descriptor is None:  # Opened again after a failure, because returning storage has new handles.
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]
        except OSError as error:
            self._release()
            return error
        return None

    def close(self) -> int:
        """Close the file, and return the number of bytes that never reached it."""
        self._release()
        return len(self._pending)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _ends_with_newline(path: Path) -> bool:
    """Return whether a file is empty or its last line is whole. A long run's file is not read for this."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def utc_now() -> str:
    """Return the time of a record, such as `2026-11-28T20:45:01.123+00:00`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return all records of a run in the order they were written, without lines that a crash cut short or spoilt.

    Raises:
        UserError: the folder has no `metrics.jsonl`.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; give the run_dir of a run")
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def events_by_step(records: list[dict[str, Any]], event: str) -> dict[int, dict[str, Any]]:
    """Return the events of a kind by step, of a repeated step the last one.

    Left out are those of steps that the run has gone back behind and not done again: it resumed from, or rolled back
    to, an earlier checkpoint.
    """
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.get("event") == "start":
            back_at = record["step"]
        elif record.get("event") == "rollback":
            back_at = int(Path(record["to"]).name.removeprefix("step-"))
        else:
            if record.get("event") == event:
                found[record["step"]] = record
            continue
        found = {step: known for step, known in found.items() if step <= back_at}
    return dict(sorted(found.items()))
