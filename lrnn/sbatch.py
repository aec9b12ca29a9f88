"""Batch scripts: fill in their #SBATCH lines, give them to sbatch, and find the jobs that squeue lists."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from lrnn.errors import UserError

# squeue lists jobs in these states for some minutes after their end. Jobs in all other states may still write.
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
# Options of an array that the job after it needs too.
OF_FOLLOWING = ("account", "partition", "qos", "reservation", "clusters")
LOCK_WAIT_S = 60  # wait for another `lrnn submit` of the folder; squeue and sbatch take seconds at most
DIRECTIVE = re.compile(r"^#SBATCH[ \t]+--([a-z-]+)(?:[ \t]*[= \t](.*?))?[ \t]*$", re.MULTILINE)
SHORT = re.compile(r"^#SBATCH[ \t]+-[A-Za-z].*$", re.MULTILINE)


@dataclass
class Job:
    """A job, or a task of an array, that squeue lists and that is not over."""

    number: str  # 4711, or 4711_3 for task 3 of an array
    state: str
    reason: str  # why the job is pending
    comment: str


@dataclass(frozen=True)
class Submission:
    """The files of one submission of an array and the job after it, which are in `root`/slurm and end with a number.

    Attributes:
        root: the folder of results.
        number: of the submission.
    """

    root: Path
    number: int

    @classmethod
    def next(cls, root: Path, name: str) -> Self:
        """Return the submission after all that have written a file such as jobs.tsv."""
        stem, _, suffix = name.rpartition(".")
        numbers = [path.stem.removeprefix(f"{stem}-") for path in (root / "slurm").glob(f"{stem}-*.{suffix}")]
        return cls(root, 1 + max((int(number) for number in numbers if number.isdigit()), default=0))

    def file(self, name: str) -> Path:
        """Return the path of a file such as jobs.tsv."""
        stem, _, suffix = name.rpartition(".")
        return self.root / "slurm" / f"{stem}-{self.number}.{suffix}"

    def log(self, name: str) -> str:
        """Return the option `output` for a file name in which sbatch replaces %A and others."""
        return f"{pattern(self.root / 'slurm')}/{name}"


def read_template(path: Path) -> str:
    """Return the text of a batch script.

    Raises:
        UserError: the file is not one, or has an option in its short form, which could be one that is filled in.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--template {path} is not UTF-8 text; give the path of a batch script") from None
    except OSError as error:
        raise UserError(
            f"--template {path} cannot be read ({error.strerror}); give the path of a batch script, such as one of "
            "slurm/*.sbatch"
        ) from None
    if not DIRECTIVE.search(text):
        raise UserError(f"--template {path} holds no line that begins with #SBATCH --; give a batch script")
    if short := SHORT.search(text):
        raise UserError(f"--template {path} has the line {short[0]!r}; write its option in full, as #SBATCH --nodes=4")
    return text


def count(option: str, value: str, lowest: int) -> int:
    """Return a number from an option's text. Raise UserError if it is not one, or below `lowest`."""
    if not value.isdecimal() or int(value) < lowest:
        raise UserError(f"{option} {value} should be a number, at least {lowest}")
    return int(value)


def other_options(given: list[str], reserved: Mapping[str, str]) -> dict[str, str]:
    """Return the options of `--sbatch OPTION=VALUE`.

    Args:
        given: the texts OPTION=VALUE.
        reserved: the options that cannot be set so, with the reason.

    Raises:
        UserError: a text names no long option, or one that is reserved.
    """
    options = {}
    for option in given:
        name, _, value = option.removeprefix("--").partition("=")
        if not re.fullmatch("[a-z][a-z-]+", name):
            raise UserError(f"--sbatch {option} should be a long option of sbatch, such as partition=h100")
        if name in reserved:
            raise UserError(f"--sbatch {option} cannot be set: {reserved[name]}")
        options[name] = value
    return options


def pattern(path: Path) -> str:
    """Return a path for an option in which sbatch replaces %j and others."""
    return str(path).replace("%", "%%")


def fill(template: str, options: dict[str, str | None], arguments: list[str], container: Sequence[str] = ()) -> str:
    """Return the template with `options` after its own #SBATCH lines and with `arguments` as its own arguments.

    Its lines stay, but for those of the same options.

    Args:
        template: text of the batch script.
        options: the options, of which those of value None are left out.
        arguments: the arguments.
        container: the words that start a container, if the script's commands are to run in one.

    Raises:
        UserError: a container is wanted, and the template does not start one.
    """
    if container and "${in_container[@]}" not in template:
        raise UserError('--template starts no container: write srun "${in_container[@]}" in it, as slurm/*.sbatch do')
    end = [match.end() for match in DIRECTIVE.finditer(template)][-1]
    head = [line for line in template[:end].split("\n") if not ((own := DIRECTIVE.match(line)) and own[1] in options)]
    head += [_directive(name, value) for name, value in options.items() if value is not None]
    words = f"\nin_container=({shlex.join(container)})" if container else ""
    return "\n".join(head) + f"\nset -- {shlex.join(arguments)}{words}" + template[end:]


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


@contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """Create a folder and hold a lock on it: between squeue and sbatch no other command may submit its jobs.

    Args:
        folder: the folder that the jobs write to.
        name: what messages call the folder, such as run_dir.

    Raises:
        UserError: the folder cannot be written, or another command holds the lock for too long.
    """
    lock = FileLock(folder / ".submit.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another lrnn submit of {folder} is running; waiting for it up to {LOCK_WAIT_S} s", flush=True)
            lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise UserError(
            f"{name} {folder}: another lrnn submit is still running after {LOCK_WAIT_S} s; check with squeue what "
            "it did, end it if it hangs, and try again"
        ) from None
    except OSError as error:
        raise not_writable(folder, name, error) from None
    try:
        yield
    finally:
        lock.release()


def not_writable(folder: Path, name: str, error: OSError) -> UserError:
    """Return the error for a folder that cannot be written."""
    return UserError(f"{name} {folder} cannot be written ({error.strerror}: {error.filename})")


def jobs() -> list[Job]:
    """Return the jobs that are not over, with each task of an array on its own."""
    found = []
    listed = call("squeue", "--all", "--array", "--noheader", "--states=all", "--format=%i|%T|%r|%k")
    for line in listed.splitlines():
        job = Job(*line.split("|", 3))
        if job.state not in OVER:
            found.append(job)
    return found


def submit(script: Path, *options: str) -> str:
    """Give a script to sbatch and return the number of the job. Raise UserError if sbatch refuses it."""
    return call("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def call(*command: str) -> str:
    """Return the output of one of SLURM's programs.

    Raises:
        UserError: the program is not installed, or it fails; then the message is its own.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not found: lrnn submit needs a machine that has the commands of SLURM"
        ) from None
    if done.returncode != 0:
        raise UserError(f"{command[0]} failed: {' '.join(done.stderr.split())}")
    return done.stdout
