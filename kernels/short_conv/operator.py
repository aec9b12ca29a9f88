"""The short convolution as PyTorch operators, which autograd and `torch.compile` see."""

import torch
import triton
from torch import Tensor

from lrnn.kernels.short_conv.kernels import short_conv_backward_kernel, short_conv_forward_kernel
from lrnn.kernels.short_conv.launch import BACKWARD, BACKWARD_PACKED, FORWARD, block_tokens, launch_on, row_steps


def compute(xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """Do what the operator does, without autograd."""
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    launch_on(short_conv_forward_kernel, FORWARD, xs, weights, before, cu_seqlens, tuple(ys))
    return ys


@torch.library.custom_op("lrnn::short_conv_forward", mutates_args=())
def _forward(xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    return compute(xs, weights, before, cu_seqlens)


@_forward.register_fake
def _(xs, weights, before, cu_seqlens):
    return [x.new_empty(x.shape) for x in xs]


@torch.library.custom_op("lrnn::short_conv_backward", mutates_args=())
def _backward(
    dys: list[Tensor], xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """Return the gradient of each x and, as the last one, that of all weights, float32 [sum of D_i, taps]."""
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    return [*dxs, write_gradients(dxs, dys, xs, weights, before, cu_seqlens)]


def write_gradients(
    dxs: list[Tensor],
    dys: list[Tensor],
    xs: list[Tensor],
    weights: list[Tensor],
    before: list[Tensor],
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Write the gradient of each x into `dxs`, whose rows may be slices of wider ones but must be evenly spaced.

    Returns:
        The gradient of all weights, float32 [sum of D_i, taps].
    """
    B, T, _ = xs[0].shape
    # One part per block of tokens, which are added up afterwards: atomic additions have no fixed order.
    shape = (B * triton.cdiv(T, block_tokens(B * T)), sum(x.shape[2] for x in xs), weights[0].shape[-1])
    parts = torch.empty(shape, dtype=torch.float32, device=xs[0].device)
    own = (tuple(dy.contiguous() for dy in dys), tuple(dxs), parts)
    tile = BACKWARD if cu_seqlens is None else BACKWARD_PACKED
    launch_on(short_conv_backward_kernel, tile, xs, weights, before, cu_seqlens, *own, SO=row_steps(dxs))
    return parts.sum(0)


@_backward.register_fake
def _(dys, xs, weights, before, cu_seqlens):
    channels = sum(x.shape[2] for x in xs)
    return [*(x.new_empty(x.shape) for x in xs), xs[0].new_empty((channels, weights[0].shape[-1]), dtype=torch.float32)]


def _save(ctx, inputs, output):
    xs, weights, before, cu_seqlens = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(*xs, *weights, *before, cu_seqlens)


def _gradients(ctx, dys):
    *tensors, cu_seqlens = ctx.saved_tensors
    n = ctx.count
    xs, weights, before = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
    *dxs, dw = torch.ops.lrnn.short_conv_backward(dys, xs, weights, before, cu_seqlens)
    dws = dw.split([x.shape[2] for x in xs])
    return dxs, [d[:, None].to(w.dtype) for d, w in zip(dws, weights, strict=True)], [None] * len(before), None


_forward.register_autograd(_gradients, setup_context=_save)
short_conv_forward = torch.ops.lrnn.short_conv_forward
