"""What the cells of a ladder that are left take, by `lrnn plan`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lrnn.errors import UserError
from lrnn.ladder.cells import Cell
from lrnn.ladder.sizes import count_parameters
from lrnn.pretrain.gpus import find_gpu
from lrnn.pretrain.plan.command import GPUS_PER_NODE
from lrnn.pretrain.plan.estimate import Estimate
from lrnn.pretrain.plan.report import notes_on
from lrnn.pretrain.plan.setup import Links, setup_of

HOUR_SECONDS = 3600
SMALLEST_MEASURED = 339e6  # parameters of the smallest model whose speed was compared with the plan


@dataclass(frozen=True)
class Cost:
    """What a cell takes.

    Attributes:
        cell: the cell.
        parameters, non_embedding: of its model.
        hours: of its training, alone on its GPUs.
        notes: figures that no measurement supports.
        warning: why it does not fit into the GPU's memory, if it does not.
    """

    cell: Cell
    parameters: int
    non_embedding: int
    hours: float
    notes: tuple[str, ...]
    warning: str | None

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cell.gpus


def costs(cells: Sequence[Cell], gpu_name: str) -> list[Cost]:
    """Return the costs of cells. Raises UserError for an unknown GPU, or a run that `lrnn plan` refuses."""
    gpu = find_gpu(gpu_name)
    links = Links.of(gpu, GPUS_PER_NODE)
    capacity = 1e9 * gpu.memory
    known: dict[tuple[str, str], tuple[int, int, Estimate]] = {}
    found = []
    for cell in cells:
        if (place := (cell.size, cell.arm)) not in known:
            try:
                setup = setup_of(cell.config, gpu, cell.gpus, GPUS_PER_NODE, links, cell.model)
            except UserError as error:
                raise UserError(f"{cell}: {error}") from None
            known[place] = *count_parameters(cell.model), Estimate(setup, capacity)
        parameters, non_embedding, estimate = known[place]
        hours = cell.tokens / estimate.tokens_per_second / HOUR_SECONDS
        notes = tuple(notes_on(estimate.setup))
        warning = None if estimate.fits else f"{cell} will not fit: {estimate.need}"
        found.append(Cost(cell, parameters, non_embedding, hours, notes, warning))
    return found


def show(found: Sequence[Cost], gpu_name: str) -> Iterator[str]:
    """Yield the lines of a table of costs, with their sum, and what about them was not measured."""
    width = max([len(cost.cell.name) for cost in found], default=0)
    yield f"{'':{width}} {'parameters':>11} {'non-emb.':>9} {'tokens':>9} {'steps':>8} {'GPUs':>5} {'hours':>7}"
    for cost in found:
        yield (
            f"{cost.cell.name:{width}} {cost.parameters / 1e6:10.2f}M {cost.non_embedding / 1e6:8.2f}M "
            f"{cost.cell.tokens / 1e6:8,.0f}M {cost.cell.steps:8,} {cost.cell.gpus:5} {cost.hours:7.2f}"
        )
    yield ""
    total = sum(cost.gpu_hours for cost in found)
    yield f"{total:.1f} GPU-hours of {gpu_name} for {len(found)} trainings, by lrnn plan"
    yield from (cost.warning for cost in found if cost.warning is not None)
    yield "Not in the sum: the start of each run, its export and what is measured of it."
    if any(cost.cell.at_once > 1 for cost in found):
        yield "Runs that share a GPU are counted as if each had it alone, so they take less."
    if any(cost.parameters < SMALLEST_MEASURED for cost in found):
        yield f"Speed was not measured below {SMALLEST_MEASURED / 1e6:.0f}M parameters."
    yield from dict.fromkeys(note for cost in found for note in cost.notes)
