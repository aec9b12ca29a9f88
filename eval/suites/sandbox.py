"""Run a program written by a model, and tell whether it passed.

The program has no network, no files of the machine except the Python installation (read-only), no home directory, an
empty /tmp in memory, an almost empty environment, and limits on time, memory, processes and file size. The Linux
kernel enforces all of this (namespaces, mounts, resource limits; see sandbox_child.py). If it refuses to, nothing is
run.
"""

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lrnn.errors import UserError

TIMEOUT_S = 10.0
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
PROCESSES = 64
CHILD = Path(__file__).with_name("sandbox_child.py")


class _Programs:
    """A progress bar of the programs that run within `counting`. It appears with the first of them."""

    total: int | None = None
    bar: tqdm | None = None

    def count(self) -> None:
        if self.total is not None:
            self.bar = self.bar or tqdm(total=self.total, unit="program", desc="running programs")
            self.bar.update()


_programs = _Programs()


@contextmanager
def counting(total: int) -> Iterator[None]:
    """Show how many of the `total` programs that `pass_at_k` runs within the `with` block are done."""
    _programs.total, _programs.bar = total, None
    try:
        yield
    finally:
        if _programs.bar is not None:
            _programs.bar.close()
        _programs.total = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program. `passed` means that it ran to its last line and exited with status 0."""

    passed: bool
    timed_out: bool
    stderr: str  # at most the last 2,000 bytes


def run(program: str, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run Python source `program` in the sandbox for at most `timeout_s` of wall time in `memory_bytes` of memory.

    A program that exits early, even with status 0, has not passed. Safe to call from several threads.

    Raises:
        UserError: the system cannot isolate the program (not Linux, or namespaces are forbidden).
    """
    if sys.platform != "linux":
        raise UserError("code written by a model can only be run on Linux: the sandbox needs its namespaces")
    token = secrets.token_hex(16)
    read_fd, write_fd = os.pipe()
    cpu_s = int(timeout_s) + 1
    with (
        os.fdopen(read_fd, "rb") as status,
        os.fdopen(write_fd, "wb") as end_of_the_program,
        tempfile.TemporaryDirectory(prefix="lrnn-sandbox-") as root,
        tempfile.TemporaryFile() as stderr,
    ):
        limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_CPU": cpu_s, "RLIMIT_NPROC": PROCESSES}
        limits |= {"RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_CORE": 0}
        limits = {name: min(value, _hard_limit(name)) for name, value in limits.items()}
        config = {"root": root, "python": sys.executable, "prefixes": _python_prefixes(), "status_fd": write_fd}
        config |= {"limits": limits, "tmpfs_bytes": 4 * FILE_BYTES}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[write_fd],
            env={},
            start_new_session=True,
        )
        end_of_the_program.close()
        # The last line proves that all lines before it ran; sys.exit(0) or os._exit(0) before it skip it.
        proof = f"\n__import__('os').write({write_fd}, b'{token}')\n"
        timed_out = False
        try:
            process.communicate((program + proof).encode("utf-8", "surrogatepass"), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = status.read(1 + len(token) + 1)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 2000))
        tail = stderr.read().decode("utf-8", "replace")
    if not said.startswith(b"R") and not timed_out:
        why = next(reversed(tail.strip().splitlines()), f"exit status {process.returncode}")
        raise UserError(
            "code written by the model was not run: this system does not let the sandbox isolate it (Linux 5.12 or "
            f"newer and root or unprivileged user namespaces are needed): {why}"
        )
    passed = not timed_out and process.returncode == 0 and said == b"R" + token.encode()
    return Outcome(passed, timed_out, tail)


def check() -> None:
    """Raise UserError unless an empty program passes. Where it does not, no program would."""
    outcome = run("")
    if not outcome.passed:
        said = next(reversed(outcome.stderr.strip().splitlines()), "no message")
        why = f"takes more than {TIMEOUT_S:g} s" if outcome.timed_out else f"fails ({said})"
        raise UserError(f"code written by the model cannot be run here: in the sandbox, an empty program {why}")


def pass_at_k(references: list[str], predictions: list[list[str]], k: int) -> float:
    """Return the mean over problems of the unbiased pass@k (Chen et al. 2021, equation 1).

    Args:
        references: the test code of each problem.
        predictions: the n >= k candidate programs of each problem.
        k: the number of programs drawn.
    """
    total = 0.0
    for tests, candidates in zip(references, predictions, strict=True):
        if len(candidates) < k:
            raise UserError(f"pass@{k} needs at least {k} candidates per problem, got {len(candidates)}")
        failed = 0
        for candidate in candidates:
            failed += not run(f"{candidate}\n{tests}").passed
            _programs.count()
        # 1 - C(failed, k) / C(n, k) is the chance that k programs drawn without replacement contain a passing one.
        miss = 1.0
        for i in range(k):
            miss *= max(0, failed - i) / (len(candidates) - i)
        total += 1.0 - miss
    return total / len(references)


def _hard_limit(name: str) -> int:
    hard = resource.getrlimit(getattr(resource, name))[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _python_prefixes() -> list[str]:
    """Return the folders of this Python: virtual environment, base installation, and the targets of their links."""
    executable = os.path.realpath(sys.executable)
    named = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(executable))}
    return sorted(named | {os.path.realpath(path) for path in named})
