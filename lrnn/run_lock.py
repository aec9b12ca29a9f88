"""A lock on a run folder, which the main process holds from start to end and the kernel frees with the process."""

import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from lrnn.errors import UserError
from lrnn.files import write_atomically

WAIT_S = 5.0  # a process of the run may be about to end


class RunLock:
    """Create `run_dir` and hold it within a `with` block.

    The lock is on a file (flock, also over NFS); a process that is killed leaves no lock behind.

    Args:
        run_dir: the folder.
        name: the setting that names it, for messages.

    Raises:
        UserError: another run holds the folder, or it cannot be written.
    """

    def __init__(self, run_dir: Path, name: str = "run_dir"):
        self._run_dir, self._holder, self._name = run_dir, run_dir / ".running.json", name
        self._lock = FileLock(run_dir / ".lock", timeout=WAIT_S)

    def __enter__(self) -> Self:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            write_atomically(self._holder, json.dumps(_this_process()))
        except Timeout:
            raise UserError(
                f"{self._name} {self._run_dir} is in use by {self._describe_holder()}; end that run, or choose another "
                f"{self._name}"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self._name} {self._run_dir} cannot be written ({error.strerror}: {error.filename})"
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            job = f", SLURM job {holder['slurm_job']}" if holder["slurm_job"] else ""
            return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # the holder has the lock but has not written its note yet
            return "another process"


def _this_process() -> dict[str, str | int | None]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
