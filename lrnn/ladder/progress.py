"""Say how far a ladder is: cells done, steps of those that run, and when it will end."""

import json
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from lrnn.ladder.cells import Cell
from lrnn.pretrain.metrics.flops import train_flops_per_token

TAIL_BYTES = 65_536  # of metrics.jsonl, in which the last step is looked for


def last_step(run_dir: Path) -> int:
    """Return the last step in the records of a run; 0 if there is none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # the first line may be cut, and so may the last one
            continue
        if "step" in record:
            return record["step"]
    return 0


class Progress:
    """The work of some cells over time, in floating-point operations of training.

    Args:
        cells: what is to be run.
    """

    def __init__(self, cells: Sequence[Cell]):
        self._work = {cell.name: cell.tokens * train_flops_per_token(cell.model) for cell in cells}
        # The shares of trainings that were begun before count as done before.
        self._before = {cell.name: last_step(cell.run_dir) / cell.steps for cell in cells}
        self._started = time.monotonic()

    def line(self, done: Sequence[Cell], failed: Sequence[Cell], running: Sequence[Cell]) -> str:
        """Return a line on the state now. Failed cells count as work that is not left."""
        shares = {cell.name: last_step(cell.run_dir) / cell.steps for cell in running}
        shares |= {cell.name: 1.0 for cell in (*done, *failed)}
        left = len(self._work) - len(done) - len(failed) - len(running)
        counts = f"{len(done)} done, {len(running)} running, {left} left"
        counts += f", {len(failed)} failed" if failed else ""
        steps = [f"{cell} {last_step(cell.run_dir):,}/{cell.steps:,}" for cell in running]
        return "; ".join([counts, *steps, *self._end(shares)])

    def _end(self, shares: dict[str, float]) -> list[str]:
        now = {name: max(shares.get(name, 0.0), before) for name, before in self._before.items()}
        made = sum(self._work[name] * (now[name] - before) for name, before in self._before.items())
        left = sum(self._work[name] * (1 - share) for name, share in now.items())
        if made <= 0:
            return []
        seconds = left / made * (time.monotonic() - self._started)
        end = datetime.now() + timedelta(seconds=seconds)
        return [f"about {seconds / 60:,.0f} min to go, until {end:%a %H:%M}"]
