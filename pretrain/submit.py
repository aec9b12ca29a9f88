"""Submit a pretraining run to SLURM. The same command resumes a run that failed or was cancelled.

The command fills in `slurm/train.sbatch`, shows it, writes it to RUN_DIR/train.sbatch and gives it to sbatch. A run
that is queued or running is not submitted a second time, not even by two commands at the same moment. Variables that
sbatch reads from its environment (SBATCH_ACCOUNT, SBATCH_PARTITION) apply here too.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lrnn import shipped
from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.pretrain.checkpoint import format as checkpoint

if TYPE_CHECKING:
    from lrnn.pretrain.config import Config

TEMPLATE = shipped.BATCH_SCRIPTS / "train.sbatch"
# squeue lists jobs in these states for some minutes after their end. Jobs in all other states may still write.
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
LOCK_WAIT_S = 60  # wait for another `lrnn submit` of the run; squeue and sbatch take seconds at most
DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", re.MULTILINE)
RESERVED = {
    "comment": "it names the run, so that the next lrnn submit finds the job",
    "nodes": "use --nodes",
    "gpus-per-node": "use --gpus-per-node",
    "ntasks-per-node": "use --gpus-per-node: one task per GPU",
    "time": "use --time",
}


@dataclass
class Job:
    """A job that squeue lists."""

    number: str
    state: str
    reason: str  # why the job is pending


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn submit`."""
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: as in the template")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="one task per GPU; 0: one task per node, on CPU (default: as in the template)",
    )
    parser.add_argument(
        "--time",
        metavar="LIMIT",
        help="time limit in the format of sbatch, such as 12:00:00 (default: as in the template)",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other long option of sbatch; may be repeated",
    )
    parser.add_argument(
        "--allow-change", action="store_true", help="resume with changed settings although they change the results"
    )
    parser.add_argument("--template", type=Path, default=TEMPLATE, help="batch script to fill in (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show the script without submitting it")
    parser.epilog = (
        "examples:\n"
        "  lrnn submit configs/1.3b.yaml --nodes 4 run_dir=runs/1.3b\n"
        "  lrnn submit configs/340m.yaml --time 12:00:00 --sbatch partition=h100 --sbatch account=nlp --dry-run"
    )


def main(args: argparse.Namespace) -> int:
    # These load transformers, which `lrnn submit --help` does without.
    from lrnn.pretrain.changes import check_changes
    from lrnn.pretrain.config import load_config, load_model_of
    from lrnn.pretrain.deepspeed_config import deepspeed_config

    config = load_config(args.config, args.overrides)
    template = read_template(args.template)
    options = sbatch_options(config, args, dict(DIRECTIVE.findall(template)))
    load_model_of(config)  # errors that would stop the run are reported before it waits in a queue
    deepspeed_config(config, int(options["nodes"] or 1) * int(options["ntasks-per-node"] or 1))
    saved = checkpoint.list_checkpoints(Path(config.run_dir))
    newest = next((folder for folder in reversed(saved) if checkpoint.holds(folder, "run.yaml")), None)
    if newest is not None:
        check_changes(newest, config, args.allow_change)
    allowed = ["--allow-change"] if args.allow_change else []
    script = fill(template, options, [args.config, *args.overrides, *allowed])
    run_dir = Path(config.run_dir).resolve()
    status = describe(config)
    if args.dry_run:
        print(f"{script}\n# {status}; not submitted (--dry-run)")
        return 0
    with only_one(run_dir):
        refuse_second_job(run_dir)
        try:
            write_atomically(run_dir / "train.sbatch", script)
        except OSError as error:
            raise _not_writable(run_dir, error) from None
        job = call("sbatch", "--parsable", str(run_dir / "train.sbatch")).strip().split(";")[0]
    print(f"{script}\nsubmitted job {job}: {status}; output in {run_dir / 'slurm.log'}")
    return 0


def read_template(path: Path) -> str:
    """Return the text of a batch script. Raises UserError if the file is not one."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(
            f"--template {path} cannot be read ({error.strerror}); give the path of a train.sbatch"
        ) from None
    if not DIRECTIVE.search(text):
        raise UserError(f"--template {path} holds no line that begins with #SBATCH --; give a batch script")
    return text


def sbatch_options(config: "Config", args: argparse.Namespace, template: dict[str, str]) -> dict[str, str | None]:
    """Return the options to set in the template; an option of value None is left out.

    Raises:
        UserError: a value is not allowed, or an option cannot be set.
    """
    counts = {"nodes": 1, "gpus-per-node": 0}
    for name, lowest in counts.items():
        given = getattr(args, name.replace("-", "_"))
        value = str(given) if given is not None else template.get(name, str(lowest))
        if not value.isdigit() or int(value) < lowest:
            raise UserError(f"--{name} {value} should be a number, at least {lowest}")
        counts[name] = int(value)
    gpus = counts["gpus-per-node"]
    run_dir = Path(config.run_dir).resolve()
    options: dict[str, str | None] = {
        "job-name": f"lrnn-{run_dir.name}",
        "comment": comment(run_dir),
        "chdir": str(Path.cwd()).replace("%", "%%"),
        "output": str(run_dir / "slurm.log").replace("%", "%%"),
        "nodes": str(counts["nodes"]),
        "ntasks-per-node": str(max(1, gpus)),
        "gpus-per-node": str(gpus) if gpus else None,
    }
    if args.time is not None:
        options["time"] = args.time
    for option in args.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        if not re.fullmatch("[a-z][a-z-]+", name):
            raise UserError(f"--sbatch {option} should be a long option of sbatch, such as partition=h100")
        if name in RESERVED:
            raise UserError(f"--sbatch {option} cannot be set: {RESERVED[name]}")
        options[name] = value
    return options


def fill(template: str, options: dict[str, str | None], arguments: list[str]) -> str:
    """Return the template with `options` among its #SBATCH lines and with `arguments` as its own arguments."""
    found = list(DIRECTIVE.finditer(template))
    kept = [match[0] for match in found if match[1] not in options]
    set_ = [_directive(name, value) for name, value in options.items() if value is not None]
    head, tail = template[: found[0].start()], template[found[-1].end() :]
    return head + "\n".join(kept + set_) + f"\nset -- {shlex.join(arguments)}" + tail


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def comment(run_dir: Path) -> str:
    """Return the comment that marks the jobs of a run."""
    return f"lrnn run_dir={run_dir}"


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Create the run's folder and hold a lock on it: between squeue and sbatch no other command may submit the run.

    Raises:
        UserError: the folder cannot be written, or another command holds the lock for too long.
    """
    lock = FileLock(run_dir / ".submit.lock")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another lrnn submit of {run_dir} is running; waiting for it up to {LOCK_WAIT_S} s", flush=True)
            lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise UserError(
            f"run_dir {run_dir}: another lrnn submit is still running after {LOCK_WAIT_S} s; check with squeue what "
            "it did, end it if it hangs, and try again"
        ) from None
    except OSError as error:
        raise _not_writable(run_dir, error) from None
    try:
        yield
    finally:
        lock.release()


def _not_writable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"run_dir {run_dir} cannot be written ({error.strerror}: {error.filename})")


def refuse_second_job(run_dir: Path) -> None:
    """Raise UserError if a job of the run may still write into its folder, now or later."""
    for job in jobs_of(run_dir):
        waits = f", {job.reason}" if job.reason != "None" else ""
        raise UserError(
            f"run_dir {run_dir} already has job {job.number} ({job.state}{waits}), which resumes by itself: wait for "
            f"its end, or end it with `scancel {job.number}`, or choose another run_dir"
        )


def jobs_of(run_dir: Path) -> list[Job]:
    """Return the jobs of a run that are not over."""
    found = []
    for line in call("squeue", "--all", "--noheader", "--states=all", "--format=%i|%T|%r|%k").splitlines():
        number, state, reason, text = line.split("|", 3)
        if text == comment(run_dir) and state not in OVER:
            found.append(Job(number, state, reason))
    return found


def describe(config: "Config") -> str:
    """Return what a job would do: start the run or resume it. Raises UserError if the run is finished."""
    run_dir = Path(config.run_dir)
    steps = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run_dir)]
    if not steps:
        return f"new run {run_dir}, {config.steps} steps"
    if steps[-1] >= config.steps:
        intact = checkpoint.find_newest(run_dir)  # reads all files, so it is called only if it matters
        if intact is not None and checkpoint.step_of(intact) >= config.steps:
            raise UserError(
                f"run_dir {run_dir} is finished: {intact} is step {steps[-1]} of {config.steps}; "
                "raise steps and add --allow-change, or choose another run_dir"
            )
    return f"resumes {run_dir} at its newest intact checkpoint (step {steps[-1]} of {config.steps})"


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
