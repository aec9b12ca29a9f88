"""Run the cells that are left on the GPUs of this machine, each in a process of its own."""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lrnn.ladder import processes
from lrnn.ladder.cell import LOG
from lrnn.ladder.cells import Cell
from lrnn.ladder.devices import Devices
from lrnn.ladder.progress import Progress
from lrnn.ladder.time_limit import TimeLimit
from lrnn.pretrain.launch import STOPPED, StopRequest

POLL_S = 0.05
SAY_EVERY_S = 30.0
LOG_LINES = 5  # of a failed cell, that are shown
GRACE_S = 10.0  # between SIGTERM and SIGKILL when this command ends by an error


@dataclass
class _Outcome:
    """What became of cells. Those that are in none of the lists were not started, or run."""

    done: list[Cell] = field(default_factory=list)
    failed: list[Cell] = field(default_factory=list)
    stopped: list[Cell] = field(default_factory=list)


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen
    started: float  # by time.monotonic


def run_cells(
    cells: Sequence[Cell],
    settings: Path,
    devices: Devices,
    limit: TimeLimit,
    say: Callable[[str], None],
    redo: bool = False,
) -> int:
    """Run cells in their order, as many at once as there is room for.

    After a stop signal, or when the time is over, no other cell starts, and the running ones write their checkpoints
    and stop. A cell that fails does not stop the others.

    Args:
        settings: YAML file of the ladder, which the processes read.
        limit: cells that would not end in time are left out.
        say: is called with lines for the user.
        redo: replace results and trainings of other settings.

    Returns:
        The exit status: 0, 1 if a cell failed, or 75 if cells were stopped or left out.
    """
    outcome, waiting = _Outcome(), list(cells)
    running: dict[str, _Running] = {}
    progress, said = Progress(cells), time.monotonic()
    options = ["--redo"] if redo else []
    try:
        with StopRequest() as stop:
            was_told = False
            while True:
                ends = stop.signal or ("the time is over" if limit.is_over and (running or waiting) else None)
                while not ends and (cell := _next(waiting, limit)) and (place := devices.place(cell)):
                    waiting.remove(cell)
                    command = ["ladder", str(settings), "--cell", cell.name, *options]
                    process = processes.start(command, _log(cell), **devices.variables(cell, place))
                    devices.add(cell, place)
                    running[cell.name] = _Running(cell, process, time.monotonic())
                    say(f"started {cell} on {' and '.join(place)}; log in {_log(cell)}")
                if ends and not was_told:
                    was_told = True
                    say(f"{ends}: {len(running)} running cells write their checkpoints and stop")
                    for one in running.values():
                        one.process.terminate()
                for one in list(running.values()):
                    if one.process.poll() is not None:
                        del running[one.cell.name]
                        devices.remove(one.cell)
                        _note(outcome, one, limit, was_told, say)
                if not running and (ends or _next(waiting, limit) is None):
                    break
                if time.monotonic() - said >= SAY_EVERY_S:
                    said = time.monotonic()
                    say(progress.line(outcome.done, outcome.failed, [one.cell for one in running.values()]))
                time.sleep(POLL_S)
    finally:
        _end([one.process for one in running.values()])
    if waiting and not was_told:
        say(f"{len(waiting)} cells would not end in the time that is left")
    _say_failures(outcome.failed, say)
    if was_told or outcome.stopped or waiting:
        return STOPPED
    return 1 if outcome.failed else 0


def _next(waiting: Sequence[Cell], limit: TimeLimit) -> Cell | None:
    """Return the first cell that ends in time."""
    return next((cell for cell in waiting if limit.allows(cell)), None)


def _log(cell: Cell) -> Path:
    return cell.run_dir / LOG


def _note(outcome: _Outcome, one: _Running, limit: TimeLimit, was_told: bool, say: Callable[[str], None]) -> None:
    """Note how a cell ended. One that was told to stop before its handlers were there is dead of SIGTERM."""
    cell, status = one.cell, one.process.returncode
    if status == 0:
        outcome.done.append(cell)
        limit.note(cell, time.monotonic() - one.started)
        say(f"finished {cell}")
    elif status == STOPPED or (was_told and status == -signal.SIGTERM):
        outcome.stopped.append(cell)
        say(f"stopped {cell}")
    else:
        outcome.failed.append(cell)
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        say(f"{cell} {how}; the others continue")


def _say_failures(failed: Sequence[Cell], say: Callable[[str], None]) -> None:
    for cell in failed:
        lines = _log(cell).read_text(errors="replace").rstrip().splitlines()[-LOG_LINES:]
        say(f"\nfailed: {cell}, {_log(cell)} ends with\n" + "\n".join(f"    {line}" for line in lines))


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes that are left because of an error in this one, or a second Ctrl-C."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
