"""Which GPUs the runs of a ladder are on, and which have room for another run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from lrnn.errors import UserError
from lrnn.ladder.cells import Cell
from lrnn.threads import usable_cores

CPU = "cpu"


def visible_devices() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them, or the CPU if it sees none."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named[:count] if named else [str(i) for i in range(count)]) or [CPU]


@dataclass
class Devices:
    """The devices, and the cells that run on each.

    Attributes:
        names: of the devices.
        running: cells by device.
    """

    names: Sequence[str]
    running: dict[str, list[Cell]] = field(init=False)

    def __post_init__(self) -> None:
        self.running = {name: [] for name in self.names}

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise UserError for a cell that needs more GPUs than there are."""
        for cell in cells:
            if self._needed(cell) > len(self.names):
                raise UserError(
                    f"{cell} takes {cell.gpus} GPUs, and {len(self.names)} can be seen; set sizes.{cell.size}.gpus=1, "
                    "leave such cells out with --cells, or use another machine"
                )

    def place(self, cell: Cell) -> tuple[str, ...]:
        """Return the devices that have room for a cell, the emptiest ones; none if it has to wait."""
        room = [name for name, cells in self.running.items() if self._fits(cell, cells)]
        room.sort(key=lambda name: len(self.running[name]))
        return tuple(room[: self._needed(cell)]) if len(room) >= self._needed(cell) else ()

    def add(self, cell: Cell, devices: Sequence[str]) -> None:
        for name in devices:
            self.running[name].append(cell)

    def remove(self, cell: Cell) -> None:
        for cells in self.running.values():
            if cell in cells:
                cells.remove(cell)

    def variables(self, cell: Cell, devices: Sequence[str]) -> dict[str, str]:
        """Return the environment by which a cell uses these devices, and its share of the cores."""
        sharing = cell.at_once * (1 if self._on_cpu else len(self.names))
        found = {} if self._on_cpu else {"CUDA_VISIBLE_DEVICES": ",".join(devices)}
        if "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(max(1, usable_cores() // sharing))
        return found

    @property
    def _on_cpu(self) -> bool:
        return list(self.names) == [CPU]

    def _needed(self, cell: Cell) -> int:
        return 1 if self._on_cpu else cell.gpus

    def _fits(self, cell: Cell, cells: Sequence[Cell]) -> bool:
        return len(cells) < min([cell.at_once, *(other.at_once for other in cells)])
