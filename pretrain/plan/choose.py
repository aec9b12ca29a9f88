"""Choose the micro-batch, recomputation and ZeRO stage of a run.

ZeRO-3 is chosen only where nothing fits without it, because its speed is estimated far above the one that was measured.
"""

from collections.abc import Iterator

from lrnn.errors import UserError
from lrnn.pretrain.plan.estimate import Estimate
from lrnn.pretrain.plan.setup import Setup

WORTH = 0.015  # a gain in speed below this is not worth a higher stage, recomputation, or a larger micro-batch
CHECKPOINTING = ("none", "mlp", "full")
STAGES = (1, 2, 3)


def choose(setup: Setup, capacity: float, stages: tuple[int, ...] = STAGES) -> Estimate | None:
    """Return the fastest way to train within the memory, or None if there is none.

    Ways that are nearly as fast as the fastest count as equal. Of these, the lowest ZeRO stage is taken, then the least
    recomputation, then the smallest micro-batch.

    Args:
        setup: the run. Its micro-batch, recomputation and stage are those that may change.
        capacity: bytes of memory of a GPU.
        stages: the ZeRO stages to choose from.

    Raises:
        UserError: the samples of a step cannot be split among the GPUs.
    """
    fitting = [estimate for way in _ways(setup, stages) if (estimate := Estimate(way, capacity)).fits]
    fitting = [estimate for estimate in fitting if estimate.setup.zero < 3] or fitting
    if not fitting:
        return None
    best = max(estimate.tokens_per_second for estimate in fitting)
    equal = [estimate for estimate in fitting if estimate.tokens_per_second >= (1 - WORTH) * best]
    return min(equal, key=lambda e: (e.setup.zero, CHECKPOINTING.index(e.setup.checkpointing), e.setup.micro_batch))


def smallest(setup: Setup, capacity: float, stages: tuple[int, ...] = STAGES) -> Estimate:
    """Return the way that takes the least memory. Raises UserError; see `choose`."""
    ways = (Estimate(way, capacity) for way in _ways(setup, stages))
    return min(ways, key=lambda estimate: estimate.memory.total)


def largest_micro_batch(setup: Setup, limit: int) -> int:
    """Return the largest micro-batch up to `limit` that a step can be split into. Raises UserError; see `choose`."""
    return max(size for size in _micro_batches(setup) if size <= limit)


def _ways(setup: Setup, stages: tuple[int, ...]) -> Iterator[Setup]:
    for stage in stages:
        for checkpointing in CHECKPOINTING:
            if checkpointing == "mlp" and not setup.fused:
                continue
            for size in _micro_batches(setup):
                yield setup.changed(zero=stage, checkpointing=checkpointing, micro_batch=size)


def _micro_batches(setup: Setup) -> list[int]:
    """Return the sizes of micro-batches that a step can be split into."""
    share, rest = divmod(setup.global_batch, setup.gpus)
    if rest or not share:
        raise UserError(
            f"global_batch_size={setup.global_batch} cannot be split among {setup.gpus} GPUs; it should be a multiple "
            "of their number"
        )
    return [size for size in range(1, share + 1) if share % size == 0]
