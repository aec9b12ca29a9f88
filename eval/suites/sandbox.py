"""Run a program that a model wrote, and say whether it passed.

The program gets no network, no file of the machine but the Python installation (read-only), no home, an empty /tmp in
memory, limits on time, memory, processes and file size, and an almost empty environment. All of it is enforced by the
Linux kernel (namespaces, mounts, resource limits; see sandbox_child.py). Where the kernel refuses, nothing is run.
"""

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lrnn.errors import UserError

TIMEOUT_S = 10.0
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
PROCESSES = 64
CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Outcome:
    """What became of a program. `passed`: it ran to its last line and exited with status 0."""

    passed: bool
    timed_out: bool
    stderr: str  # at most the last 2,000 bytes


def run(program: str, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run Python source `program` in the sandbox for at most `timeout_s` of wall time in `memory_bytes` of memory.

    A program that leaves early, even with status 0, has not passed. Safe to call from several threads.
    Raises UserError where the system can't isolate the program (not Linux, or namespaces are forbidden).
    """
    if sys.platform != "linux":
        raise UserError("model-written code can only be run on Linux: the sandbox needs its namespaces")
    token = secrets.token_hex(16)
    read_fd, write_fd = os.pipe()
    cpu_s = int(timeout_s) + 1
    with tempfile.TemporaryDirectory(prefix="lrnn-sandbox-") as root, tempfile.TemporaryFile() as stderr:
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
        os.close(write_fd)
        # The last line proves that all lines before it ran; sys.exit(0) or os._exit(0) in the middle do not reach it.
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
        with os.fdopen(read_fd, "rb") as status:
            said = status.read(1 + len(token) + 1)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 2000))
        tail = stderr.read().decode("utf-8", "replace")
    if not said.startswith(b"R") and not timed_out:
        raise UserError(
            "model-written code was not run: this system does not let the sandbox isolate it (Linux 5.12 or newer, and "
            f"root or unprivileged user namespaces, are needed): {tail.strip().splitlines()[-1:] or process.returncode}"
        )
    passed = not timed_out and process.returncode == 0 and said == b"R" + token.encode()
    return Outcome(passed, timed_out, tail)


def pass_at_k(references: list[str], predictions: list[list[str]], k: int) -> float:
    """Mean over problems of the unbiased pass@k (Chen et al. 2021, equation 1).

    `references[i]` is the test code of problem i, `predictions[i]` its n >= k candidate programs.
    """
    total = 0.0
    for tests, candidates in zip(references, predictions, strict=True):
        if len(candidates) < k:
            raise UserError(f"pass@{k} needs at least {k} candidates a problem, got {len(candidates)}")
        failed = sum(not run(f"{candidate}\n{tests}").passed for candidate in candidates)
        # 1 - C(failed, k) / C(n, k), the chance that k drawn without return hold a passing one.
        miss = 1.0
        for i in range(k):
            miss *= max(0, failed - i) / (len(candidates) - i)
        total += 1.0 - miss
    return total / len(references)


def _hard_limit(name: str) -> int:
    hard = resource.getrlimit(getattr(resource, name))[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _python_prefixes() -> list[str]:
    """Folders that this Python consists of: virtual environment, base installation and where their links lead."""
    executable = os.path.realpath(sys.executable)
    named = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(executable))}
    return sorted(named | {os.path.realpath(path) for path in named})
