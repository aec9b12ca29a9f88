"""The training state inside a ZeRO optimizer, as named fragments of parameters.

ZeRO keeps, on each rank, flat slices of the float32 parameters and of Adam's moments. This module cuts every slice at
parameter boundaries and names the pieces, so that a rank holds a set of (parameter, start, numel) fragments. Fragments
saved by any number of ranks under any stage can be restored by any other number under any other stage. None of
DeepSpeed's own checkpoint formats allows that (a universal checkpoint of ZeRO-1 does not load under ZeRO-3). Nothing
is pickled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.pretrain.engine import Engine

KINDS = ("param", "exp_avg", "exp_avg_sq")  # float32 parameter and Adam's moments


@dataclass
class Fragment:
    """Elements [start, start + numel) of a flattened parameter. `tensors[kind]` is a view into the live state."""

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


def local_fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield the fragments that this rank holds, under ZeRO-1, 2 or 3."""
    names = {id(p): n for n, p in engine.module.named_parameters()}
    zero = engine.optimizer
    layout = _layout_stage3 if engine.zero_optimization_stage() == 3 else _layout_stage12
    for flat, pieces in layout(zero):
        state = _adam_state(zero.optimizer, flat)
        tensors = {"param": flat.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        for parameter, start, numel, offset in pieces:
            yield Fragment(
                names[id(parameter)], start, numel, {k: t.narrow(0, offset, numel) for k, t in tensors.items()}
            )


def optimizer_step(engine: Engine) -> int:
    """Return the number of updates that Adam has applied."""
    steps = {int(s["step"]) for s in engine.optimizer.optimizer.state.values() if "step" in s}
    assert len(steps) <= 1, f"parameter groups disagree about the step: {steps}"
    return steps.pop() if steps else 0


def restore(engine: Engine, read: Callable[[str, str, int, int], Tensor], step: int) -> None:
    """Fill this rank's fragments from `read(kind, name, start, numel)` and set Adam's step.

    The weights of the module must already have the same values: load them before `deepspeed.initialize`.
    """
    for fragment in local_fragments(engine):
        for kind in KINDS:
            fragment.tensors[kind].copy_(read(kind, fragment.name, fragment.start, fragment.numel))
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(step)


def load_module(engine: Engine, load: Callable[[torch.nn.Module], object]) -> None:
    """Apply `load`, which fills the parameters of a module in place, to a module that ZeRO may have partitioned.

    The optimizer's own float32 copies are not changed; `restore` fills those.
    """
    if engine.zero_optimization_stage() < 3:
        load(engine.module)  # the optimizer gathers its weights into these parameters after each update
        return
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        if dist.get_rank() == 0:  # they are broadcast and partitioned again on leaving the block
            load(engine.module)
    zero: Any = engine.optimizer
    persistent = zero.persistent_parameters
    if persistent:  # ZeRO-3 expects small parameters to be whole on every rank
        persistent[0].all_gather(persistent)


def _layout_stage12(zero: Any):
    """Yield (flat slice of this rank, [(parameter, start in parameter, numel, offset in slice)]) for each group."""
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        low = dist.get_rank(zero.real_dp_process_group[i]) * zero.partition_size[i]
        high = low + zero.partition_size[i]
        pieces = []
        for parameter, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            start, end = max(low, offset), min(high, offset + parameter.numel())
            if start < end:
                pieces.append((parameter, start - offset, end - start, start - low))
        yield flat, pieces


def _layout_stage3(zero: Any):
    """Yield the same for stage 3, where each parameter is cut into equal parts, the last one padded."""
    rank = dist.get_rank(zero.dp_process_group)
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces, offset = [], 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel
            start, end = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < end:
                pieces.append((parameter, start, end - start, offset))
            offset += part
        yield flat, pieces


def _adam_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return Adam's state for a flat slice. Before the first update it is created as torch.optim.AdamW would do."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
    if "step" not in state:
        fused = optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
    return state
