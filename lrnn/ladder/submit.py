"""Submit the cells that are left as arrays of SLURM jobs, and a job that reports when they have ended.

The tasks of an array have equally many GPUs, so cells of each number of GPUs are an array of their own.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lrnn import container, sbatch, shipped
from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.ladder.cells import Cell
from lrnn.ladder.config import LadderConfig
from lrnn.ladder.measure.measure import check_data
from lrnn.ladder.processes import write_settings
from lrnn.run_lock import RunLock

CELLS, REPORT = shipped.BATCH_SCRIPTS / "ladder.sbatch", shipped.BATCH_SCRIPTS / "report.sbatch"
MARK = "lrnn ladder="  # begins the comment of an array, and the file with its cells follows
RESERVED = {
    "array": "the cells that are left decide it; --max-concurrent limits how many run at the same time",
    "comment": "it names the cells, so that the next --submit finds them",
    "gpus": "use --gpus-per-node, or sizes.NAME.gpus of the ladder",
    "gpus-per-node": "use --gpus-per-node, or sizes.NAME.gpus of the ladder",
    "nodes": "a cell runs on one node",
    "time": "use --time",
}


@dataclass(frozen=True)
class Array:
    """An array of jobs: cells that take equally many GPUs."""

    gpus: int
    cells: Sequence[Cell]


def submit(args: argparse.Namespace, ladder: LadderConfig, chosen: Sequence[Cell], left: Sequence[Cell]) -> int:
    """Submit cells. Return the exit status.

    Args:
        args: the parsed arguments of `lrnn ladder`.
        chosen: the cells that were asked for.
        left: those of them that have no result, or one of other settings that is to be replaced.

    Raises:
        UserError: something is wrong, or SLURM refuses the jobs. Nothing stays submitted then.
    """
    template = sbatch.read_template(args.template or CELLS)
    directives = _directives(args)
    out = Path(ladder.out).resolve()
    for cell in left:
        cell.corpora()
    check_data(ladder.measure)
    done = f"{len(chosen) - len(left)} with results"
    if args.dry_run:
        plan = sbatch.Submission.next(out, "ladder.yaml")
        for array in _arrays(left, args.gpus_per_node):
            print(_script(template, directives, args, ladder, plan, array))
            print("".join(f"# {cell}\n" for cell in array.cells))
        print(f"# {len(left)} to run, {done}; not submitted, and SLURM not asked what is queued (--dry-run)")
        return 0
    if not left:
        print(f"nothing to submit: {done}; --report writes the report")
        return 0
    with sbatch.only_one(out, "out"), RunLock(out, "out"):
        waiting = _queued(out)
        left = [cell for cell in left if cell.name not in waiting]
        done += f", {sum(cell.name in waiting for cell in chosen)} queued or running"
        if not left:
            print(f"nothing to submit: {done}")
            return 0
        plan = sbatch.Submission.next(out, "ladder.yaml")
        write_settings(ladder, plan.file("ladder.yaml"))
        scripts = [
            (array, _script(template, directives, args, ladder, plan, array))
            for array in _arrays(left, args.gpus_per_node)
        ]
        jobs, last = _submit(plan, scripts, _reporting(directives, args, plan))
    for job, (array, _) in zip(jobs, scripts, strict=True):
        print(f"submitted job {job}: {len(array.cells)} cells with {array.gpus} GPUs each")
    print(f"submitted job {last}, which starts after them and writes {out / 'report'}; {done}; logs in {out / 'slurm'}")
    return 0


def _directives(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the options of sbatch that the user asked for. Raise UserError if one cannot be set."""
    options: dict[str, str | None] = {} if args.time is None else {"time": args.time}
    if args.gpus_per_node is not None:
        sbatch.count("--gpus-per-node", args.gpus_per_node, 0)
    if args.max_concurrent is not None:
        sbatch.count("--max-concurrent", args.max_concurrent, 1)
    return options | sbatch.other_options(args.sbatch, RESERVED)


def _arrays(cells: Sequence[Cell], gpus: str | None) -> list[Array]:
    """Return the arrays of cells. `gpus`, if it is given, is the number of GPUs of each cell."""

    def of(cell: Cell) -> int:
        return cell.gpus if gpus is None else int(gpus)

    ordered = sorted(cells, key=of)  # stable: within an array the order is that of the ladder
    return [Array(count, list(found)) for count, found in groupby(ordered, key=of)]


def _script(
    template: str,
    directives: dict[str, str | None],
    args: argparse.Namespace,
    ladder: LadderConfig,
    plan: sbatch.Submission,
    array: Array,
) -> str:
    """Return the batch script of an array."""
    limit = f"%{args.max_concurrent}" if args.max_concurrent is not None else ""
    table, settings = plan.file(_table(array)), plan.file("ladder.yaml")
    own = {
        "job-name": f"lrnn-ladder-{plan.root.name}",
        "comment": f"{MARK}{table}",
        "chdir": sbatch.pattern(Path.cwd()),
        "output": plan.log("%A-%a.log"),
        "array": f"0-{len(array.cells) - 1}{limit}",
        "gpus": None,
        "gpus-per-node": str(array.gpus) if array.gpus else None,
    }
    words = [str(table), str(settings), *(["--redo"] if args.redo else [])]
    read = container.paths_in([*(cell.config.model_dump() for cell in array.cells), ladder.measure.model_dump()])
    out = plan.root if plan.root.is_dir() else plan.root.parent  # it may not exist yet if this is a dry run
    return sbatch.fill(template, {**own, **directives}, words, container.words(args.container, [out, *read]))


def _table(array: Array) -> str:
    """Return the name of the file with the cells of an array."""
    return f"cells-on-{array.gpus}.txt"


def _reporting(directives: dict[str, str | None], args: argparse.Namespace, plan: sbatch.Submission) -> str:
    """Return the batch script of the job that reports."""
    own = {
        "job-name": f"lrnn-report-{plan.root.name}",
        "chdir": sbatch.pattern(Path.cwd()),
        "output": plan.log("report-%j.log"),
    }
    shared = {name: value for name, value in directives.items() if name in sbatch.OF_FOLLOWING}
    words = container.words(args.container, [plan.root])
    return sbatch.fill(sbatch.read_template(REPORT), {**own, **shared}, [str(plan.file("ladder.yaml"))], words)


def _queued(out: Path) -> set[str]:
    """Return the names of the cells of a ladder that are queued or running as jobs, whoever submitted them."""
    found: set[str] = set()
    for job in sbatch.jobs():
        table = Path(job.comment.removeprefix(MARK))
        if not job.comment.startswith(MARK) or table.parent.parent != out:
            continue
        try:
            names = table.read_text().splitlines()
        except OSError:  # its tasks cannot read the file either
            continue
        number = job.number.partition("_")[2]
        found |= set(names[int(number) : int(number) + 1] if number.isdigit() else names)
    return found


def _submit(plan: sbatch.Submission, scripts: Sequence[tuple[Array, str]], reporting: str) -> tuple[list[str], str]:
    """Write the files and submit all jobs. Return the numbers of the arrays, and that of the job that reports.

    If one is refused, those before it are cancelled.
    """
    try:
        write_atomically(plan.file("report.sbatch"), reporting)
        for array, script in scripts:
            write_atomically(plan.file(_table(array)), "".join(f"{cell}\n" for cell in array.cells))
            write_atomically(plan.file(f"cells-on-{array.gpus}.sbatch"), script)
    except OSError as error:
        raise sbatch.not_writable(plan.root, "out", error) from None
    jobs: list[str] = []
    try:
        for array, _ in scripts:
            jobs.append(sbatch.submit(plan.file(f"cells-on-{array.gpus}.sbatch")))
        return jobs, sbatch.submit(plan.file("report.sbatch"), f"--dependency=afterany:{':'.join(jobs)}")
    except UserError as error:
        for job in jobs:
            sbatch.call("scancel", job)
        raise UserError(
            f"{error}; the jobs that were submitted before it are cancelled: {', '.join(jobs) or 'none'}"
        ) from None
