"""The lines of a plan that `lrnn pretrain` prints at its start on GPUs."""

import platform
from collections.abc import Iterator

import torch

from lrnn import LrnnConfig
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.gpus import find_device
from lrnn.pretrain.plan.choose import STAGES, WORTH, choose
from lrnn.pretrain.plan.estimate import GB, Estimate
from lrnn.pretrain.plan.setup import Links, setup_of


def lines_at_start(config: Config, model: LrnnConfig, ranks: Ranks, steps: int) -> list[str]:
    """Return the lines that say what the run takes on its GPUs. All ranks call this.

    Args:
        config: the run, which has been found possible.
        model: its model.
        ranks: the processes, each with a GPU.
        steps: number of steps that are left.
    """
    hosts = ranks.gather(platform.node())
    per_node = hosts.count(platform.node())
    name = torch.cuda.get_device_name(ranks.device)
    gpu = find_device(name)
    if gpu is None:
        return [f"no estimate of memory and speed: {name} is not among the GPUs that `lrnn plan` knows"]
    setup = setup_of(config, gpu, ranks.world_size, per_node, Links.of(gpu, per_node), model)
    capacity = torch.cuda.get_device_properties(ranks.device).total_memory
    stages = STAGES if config.deepspeed is None else (setup.zero,)
    return list(_summary(Estimate(setup, capacity), choose(setup, capacity, stages), steps))


def _summary(configured: Estimate, suggested: Estimate | None, steps: int) -> Iterator[str]:
    """Yield what a run takes, whether that may not fit, and what would be faster."""
    memory, gpus = configured.memory, configured.setup.gpus
    parts = {
        "parameters": memory.parameters + memory.copies,
        "gradients": memory.gradients + memory.buckets,
        "optimizer": memory.optimizer,
        "activations and logits": memory.activations + memory.logits + memory.workspace,
    }
    listed = ", ".join(f"{part} {size / GB:.1f}" for part, size in parts.items())
    yield (
        f"estimate: {memory.total / GB:.1f} of {configured.capacity / GB:.0f} GB per GPU ({listed}), "
        f"{configured.tokens_per_second / gpus:,.0f} tokens/s per GPU, {_time(configured.days(steps))} to go"
    )
    if not configured.fits:
        yield f"warning: this may not fit: {configured.need}"
    if suggested is None:
        if not configured.fits:
            yield "nothing else would fit either; see `lrnn plan`"
        return
    gain = suggested.tokens_per_second / configured.tokens_per_second
    if not configured.fits or gain > 1 + WORTH:
        yield f"`lrnn plan` suggests {suggested.setup.changes}: {gain:.2f} times the estimated speed"


def _time(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
