"""Records of a run as JSON lines: appended so that a full disk loses none, read so that a cut line is passed over."""

import json
import os
from pathlib import Path
from typing import Any

from lrnn.errors import UserError


class DurableLines:
    """Appends lines to a file. What the storage refuses is kept, and tried again with the next line."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        # By a crash: what follows must not become part of that line.
        self._pending = bytearray(b"\n" if cut else b"")

    def write(self, line: str) -> OSError | None:
        """Append a line; returns why it is not on its way to the disk."""
        self._pending += line.encode() + b"\n"
        try:
            if self._descriptor is None:  # anew after a failure: storage that came back has new handles
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]
        except OSError as error:
            self._release()
            return error
        return None

    def close(self) -> int:
        """Close the file; returns how many bytes never reached it."""
        self._release()
        return len(self._pending)

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run in the order they were written; a line cut short by a crash is left out.

    Raises:
        UserError: the folder holds no metrics.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; give the run_dir of a run")
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
