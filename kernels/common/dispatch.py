"""Decide whether a computation runs in Triton kernels or in PyTorch."""

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # with TRITON_INTERPRET=1, kernels run on CPU tensors, for tests


def use_kernels(x: Tensor) -> bool:
    """Return whether Triton kernels compute on x: on a GPU always, on the CPU in Triton's interpreter alone."""
    return x.is_cuda or INTERPRETED


def runs_without_gradients(*tensors: Tensor) -> bool:
    """Return whether kernels without a backward pass may compute on these tensors, all on one device."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return use_kernels(tensors[0])
