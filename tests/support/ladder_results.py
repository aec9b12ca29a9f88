"""Results of cells that nothing was trained for."""

from lrnn.ladder.cells import Cell
from lrnn.ladder.results import CellResult


def result_of(cell: Cell, **changed) -> CellResult:
    """Return a result without figures."""
    facts = {
        "name": cell.name, "size": cell.size, "arm": cell.arm, "range": cell.range, "seed": cell.seed,
        "tokens": cell.tokens, "lr": cell.lr, "parameters": 2, "non_embedding_parameters": 1, "steps": cell.steps,
        "tokens_per_step": cell.tokens_per_step, "settings": cell.settings, "corpora": {"code": "a", "prose": "b"},
        "figures": (), "training": {}, "environment": {},
    }  # fmt: skip
    return CellResult(**facts | changed)
