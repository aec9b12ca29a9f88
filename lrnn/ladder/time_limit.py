"""A limit on the time of a command: when it is over, and which cells still end before."""

import math
import time
from collections.abc import Sequence

from lrnn.ladder.cells import Cell
from lrnn.ladder.progress import last_step
from lrnn.pretrain.metrics.flops import train_flops_per_token


class TimeLimit:
    """The time that a command has for cells.

    How long a cell takes is estimated from those of its size that ended before, the slowest of them, and from those of
    other sizes as long as there are none. Before the first has ended, all cells are supposed to fit.

    Args:
        minutes: from now; None for no limit.
        cells: what is to be run.
    """

    def __init__(self, minutes: float | None, cells: Sequence[Cell]):
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._left = {cell.name: 1 - last_step(cell.run_dir) / cell.steps for cell in cells}  # shares of trainings
        self._paces: dict[str, float] = {}  # seconds per FLOP of training, by size

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def allows(self, cell: Cell) -> bool:
        """Return whether a cell that starts now ends in time."""
        pace = self._paces.get(cell.size, min(self._paces.values(), default=0.0))
        return time.monotonic() + pace * _work(cell) * self._left[cell.name] < self._end

    def note(self, cell: Cell, seconds: float) -> None:
        """Note that a cell has ended with a result, after so many seconds."""
        if self._left[cell.name] == 1:  # others were begun by an earlier command
            self._paces[cell.size] = max(self._paces.get(cell.size, 0.0), seconds / _work(cell))


def _work(cell: Cell) -> float:
    return cell.tokens * train_flops_per_token(cell.model)
