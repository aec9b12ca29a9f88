"""The norm of the gradient, computed without copies of it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def read_once(zero: Any) -> None:
    """Make a ZeRO-1 or 2 optimizer of DeepSpeed compute the norm of a group's gradients in one pass over them.

    DeepSpeed's own method first writes each gradient again in float64: 12 ms per step at 1.36B on an H200. Here the
    squares of a gradient are summed in float32, in a tree as CUDA does, and the sums of all gradients in float64.
    """

    def norm(gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        assert norm_type == 2
        own = [g for g in gradients if not getattr(g, "_zero_padding", False)][: len(params)]
        norms = torch._foreach_norm(own) if own else [torch.zeros((), device=zero.device)]
        total = torch.stack(list(norms)).double().square().sum().float()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=zero.dp_process_group)
        total = total.sqrt()
        return torch.where(total.isfinite(), total, -1.0)  # DeepSpeed's mark of a gradient that is not finite

    zero.get_grad_norm_direct = norm
