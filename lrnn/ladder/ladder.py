"""Train models over sizes, arms, eigenvalue ranges and seeds; measure each, and report what they show.

Every cell of the ladder is an ordinary run of `lrnn pretrain`, which is then exported and measured. Cells run on all
GPUs of this machine, several small ones at once on each; --submit runs them as jobs of SLURM. The same command
continues a ladder that was stopped: cells with results are not run again. SIGTERM, SIGUSR1 and Ctrl-C let the running
cells write their checkpoints, and exit with status 75.
"""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lrnn import container
from lrnn.errors import UserError
from lrnn.run_lock import RunLock
from lrnn.settings import name_hint

if TYPE_CHECKING:  # They import torch, which `lrnn ladder --help` does without.
    from lrnn.ladder.cells import Cell
    from lrnn.ladder.config import LadderConfig
    from lrnn.ladder.kept import Kept

EXAMPLES = """examples:
  lrnn ladder ranges --dry-run                   # the runs, and what they take
  lrnn ladder ranges out=runs/ladder             # run what is left on all GPUs, and report
  lrnn ladder ranges --cells '15m/*/seed-0'      # only some of it
  lrnn ladder ranges --submit --time 2:00:00 --sbatch partition=h200
  lrnn ladder ranges --report                    # report the results that are there"""
OF_SUBMIT = ("time", "gpus_per_node", "sbatch", "template", "container", "max_concurrent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn ladder`."""
    parser.epilog = EXAMPLES
    parser.add_argument("config", help="YAML file of the ladder, or its name")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the ladder")
    parser.add_argument(
        "--cells", metavar="GLOB", help="run only cells whose names match, such as '15m/*/seed-0'; * matches / too"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="stop after so many minutes as a signal would, and start no cell that would not end before, by the time "
        "that earlier ones took",
    )
    parser.add_argument(
        "--redo",
        action="store_true",
        help="run cells again whose results are of other settings: measure again if only what is measured has changed, "
        "otherwise train again",
    )
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--dry-run", action="store_true", help="show the cells that are left and what they take")
    doing.add_argument("--report", action="store_true", help="only write the report, of the results that are there")
    doing.add_argument("--cell", metavar="NAME", help="run one cell in this process, as jobs of SLURM do")
    parser.add_argument(
        "--gpu", default="H200", metavar="NAME", help="kind of GPU for --dry-run, as in `lrnn plan` (default H200)"
    )
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument(
        "--submit", action="store_true", help="submit the cells that are left as jobs; with --dry-run, show the jobs"
    )
    slurm.add_argument(
        "--time", metavar="LIMIT", help="time limit of a cell in the format of sbatch (default: as in the template)"
    )
    slurm.add_argument(
        "--gpus-per-node", metavar="N", help="GPUs of each cell, 0 for none (default: sizes.NAME.gpus of the ladder)"
    )
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other long option of sbatch; may be repeated",
    )
    slurm.add_argument(
        "--template", type=Path, metavar="FILE", help="batch script to fill in (default: the one that comes with lrnn)"
    )
    slurm.add_argument("--max-concurrent", metavar="N", help="cells that run at the same time (default: all)")
    container.add_argument(slurm)


def main(args: argparse.Namespace) -> int:
    """Run the command. Return the exit status.

    It is 0, 1 if cells failed, 2 if there is nothing to report, or 75 if a signal or `--minutes` left some.
    """
    _check(args)
    from lrnn.ladder.cells import load_ladder

    ladder, cells = load_ladder(args.config, args.overrides)
    if args.cell is not None:
        from lrnn.ladder.cell import run_cell

        return run_cell(ladder, _named(cells, args.cell), args.redo)
    if args.report:
        return 0 if _report(ladder, cells) else 2
    from lrnn.ladder.kept import Kept

    chosen = _matching(cells, args.cells)
    kept = Kept.of(chosen)
    if not args.redo:
        kept.refuse_changed()
    done = {result.name for result in kept.results}
    left = [cell for cell in chosen if cell.name not in done]
    if args.submit:
        from lrnn.ladder.submit import submit

        return submit(args, ladder, chosen, left)
    if args.dry_run:
        return _show(ladder, kept, left, args.gpu)
    return _run(ladder, cells, kept, left, args)


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    if args.submit and (args.report or args.cell is not None):
        raise UserError("--submit submits the cells that are left; leave out --report and --cell")
    if args.cells is not None and (args.report or args.cell is not None):
        raise UserError("--cells chooses among the cells that are left; leave it out beside --report and --cell")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g} should be a positive number")
    if args.minutes is not None and (args.report or args.submit or args.cell is not None or args.dry_run):
        raise UserError(
            "--minutes is for cells that run here; leave it out beside --submit, --dry-run, --report and --cell"
        )
    if args.redo and args.report:
        raise UserError("--redo runs cells again; leave it out beside --report")
    for name in OF_SUBMIT if not args.submit else ():
        if getattr(args, name) not in (None, []):
            raise UserError(f"--{name.replace('_', '-')} is for SLURM; add --submit")


def _named(cells: "list[Cell]", name: str) -> "Cell":
    for cell in cells:
        if cell.name == name:
            return cell
    raise UserError(f"--cell {name} is not a cell of the ladder; {name_hint(name, [cell.name for cell in cells])}")


def _matching(cells: "list[Cell]", pattern: str | None) -> "list[Cell]":
    if pattern is None:
        return cells
    found = [cell for cell in cells if fnmatchcase(cell.name, pattern)]
    if not found:
        raise UserError(
            f"--cells {pattern} matches none of the {len(cells)} cells, the first of which is {cells[0]}; "
            "--dry-run shows them"
        )
    return found


def _show(ladder: "LadderConfig", kept: "Kept", left: "list[Cell]", gpu: str) -> int:
    from lrnn.ladder.cost import costs, show

    print("\n".join(show(costs(left, gpu), gpu)) if left else "nothing is left to train")
    print(f"{len(kept.done)} cells have results in {Path(ladder.out) / 'results'}; nothing was started (--dry-run)")
    return 0


def _run(
    ladder: "LadderConfig", cells: "list[Cell]", kept: "Kept", left: "list[Cell]", args: argparse.Namespace
) -> int:
    """Run what is left, and report. Return the exit status."""
    from lrnn.ladder.devices import Devices, visible_devices
    from lrnn.ladder.measure.measure import check_data
    from lrnn.ladder.processes import write_settings
    from lrnn.ladder.run_here import run_cells
    from lrnn.ladder.time_limit import TimeLimit

    out, status = Path(ladder.out), 0
    devices = Devices(visible_devices())
    devices.check(left)
    for cell in left:  # What is missing is found before anything runs.
        cell.corpora()
    if left:
        check_data(ladder.measure)
    with RunLock(out, "out"):
        print(f"{len(left)} cells to run, {len(kept.done)} with results; on {', '.join(devices.names)}", flush=True)
        if left:
            write_settings(ladder, out / "ladder.yaml")
            limit = TimeLimit(args.minutes, left)
            status = run_cells(
                left, out / "ladder.yaml", devices, limit, lambda text: print(text, flush=True), args.redo
            )
        if status not in (0, 1):
            print("stopped; the same command continues, and --report writes the report so far", flush=True)
        else:
            _report(ladder, cells)
    return status


def _report(ladder: "LadderConfig", cells: "list[Cell]") -> bool:
    """Write the report of all results, and say where. Return whether there are any."""
    from lrnn.ladder.kept import Kept

    out, kept = Path(ladder.out), Kept.of(cells)
    for name in kept.changed:
        print(f"left out of the report: {name}, whose result is of other settings", flush=True)
    if not kept.results:
        print(f"no report: {out / 'results'} holds no result of this ladder's {len(cells)} cells", flush=True)
        return False
    from lrnn.ladder.report.write import write_report  # here, because it imports matplotlib

    write_report(ladder, cells, kept.results, out)
    print(f"{len(kept.results)} of {len(cells)} cells: {out / 'report' / 'ladder.md'} and report.html", flush=True)
    return True
