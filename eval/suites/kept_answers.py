"""The answers of an evaluation under way, on disk, so that one that was stopped continues where it was."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class KeptAnswers:
    """Answers by key, appended to a file that a later run of the same evaluation reads.

    The file is beside the result folder, under a name that begins with a dot, and is removed when the results are
    written.

    Args:
        out: the result folder.
        about: what the answers depend on: the model's files, settings, versions. Answers of another are dropped.
    """

    def __init__(self, out: Path, about: dict[str, Any]):
        self.path = out.absolute().with_name(f".{out.name}.answers.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        self._known = self._read(digest)
        if self._known:
            print(f"{len(self._known)} chunks of answers are kept from before, in {self.path}", flush=True)
        self._file = self.path.open("a" if self._known else "w", encoding="utf-8")
        if not self._known:
            self._write({"about": digest})

    def get(self, key: str) -> list[Any] | None:
        """Return the answers to the requests of a chunk, None if they are not known."""
        return self._known.get(key)

    def add(self, key: str, answers: list[Any]) -> None:
        """Keep the answers to the requests of a chunk, on disk when this returns."""
        self._write({"key": key, "answers": answers})
        self._known[key] = answers

    def close(self) -> None:
        """Close the file. One without answers is removed."""
        self._file.close()
        if not self._known:
            self.remove()

    def remove(self) -> None:
        """Remove the file: it is of no more use, because the results are written."""
        self.path.unlink(missing_ok=True)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, digest: str) -> dict[str, list[Any]]:
        """Return the answers in the file, up to a damaged line; none if they are of something else."""
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        rows: list[dict[str, Any]] = []
        whole = 0  # bytes
        for line in content.splitlines(keepends=True):
            try:
                rows.append(json.loads(line if line.endswith(b"\n") else b""))
            except ValueError:
                break
            whole += len(line)
        if not rows or rows[0].get("about") != digest:
            if len(rows) > 1:
                print(
                    f"answers in {self.path} are dropped: the model, the settings or a version has changed", flush=True
                )
            return {}
        if whole < len(content):
            os.truncate(self.path, whole)  # the next line must not follow half of one
        return {row["key"]: row["answers"] for row in rows[1:]}
