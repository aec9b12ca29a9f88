"""The training state inside a ZeRO optimizer, as named fragments of parameters.

ZeRO keeps, on each rank, flat slices of the float32 parameters and of the optimizer's state: Adam's moments, or Muon's
momentum. This module cuts every slice at parameter boundaries and names the pieces, so that a rank holds a set of
(parameter, start, numel) fragments. Fragments saved by any number of ranks under any stage can be restored by any other
number under any other stage. None of DeepSpeed's own checkpoint formats allows that (a universal checkpoint of ZeRO-1
does not load under ZeRO-3). Nothing is pickled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.pretrain.engine import Engine
from lrnn.pretrain.muon.optimizer import MuonAdamW
from lrnn.pretrain.zero_layout import slices


@dataclass
class Fragment:
    """Elements [start, start + numel) of a flattened parameter.

    `tensors[kind]` is a view into the live state. The kinds are "param", the float32 parameter, and those of the
    optimizer: "exp_avg" and "exp_avg_sq" of Adam, "momentum_buffer" of Muon.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


def local_fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield the fragments that this rank holds, under ZeRO-1, 2 or 3."""
    names = {id(p): n for n, p in engine.module.named_parameters()}
    for _, flat, pieces in slices(engine.optimizer, engine.zero_optimization_stage()):
        tensors = {"param": flat.data} | _optimizer_state(engine.optimizer.optimizer, flat)
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
    """Fill this rank's fragments from `read(kind, name, start, numel)` and set the step of Adam.

    The weights of the module must already have the same values: load them before `deepspeed.initialize`.
    """
    for fragment in local_fragments(engine):
        for kind, tensor in fragment.tensors.items():
            tensor.copy_(read(kind, fragment.name, fragment.start, fragment.numel))
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
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


def _optimizer_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return what the optimizer keeps for each number of a flat slice.

    Before the first update it is created as the optimizer would do.
    """
    if isinstance(optimizer, MuonAdamW) and optimizer.holds_matrices(flat):
        return {"momentum_buffer": optimizer.momentum(flat)}
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
    if "step" not in state:
        fused = optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
    return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}
