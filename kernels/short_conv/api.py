"""The short convolution of the mixers: on CUDA in Triton kernels, on CPU in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrnn.kernels.common.dispatch import use_kernels
from lrnn.kernels.common.dtypes import DTYPES
from lrnn.kernels.reference import short_conv as reference
from lrnn.kernels.short_conv.operator import short_conv_forward

TAPS = (2, 3, 4)
MAX_TENSORS = 3


def short_conv(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    before: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """Return silu(causal depthwise convolution over time) of each tensor.

    On CUDA, one Triton kernel computes all outputs and another one all gradients. Sums are in float32 (in float64 for
    float64, on CPU). Only the inputs are kept for the backward pass. The gradients of the weights are summed in a fixed
    order.

    Args:
        xs: one to three tensors [B, T, D_i] of one dtype: bfloat16, float16 or float32 (float64 on CPU). A tensor is
            read in place if its channels are contiguous and its B * T rows are equally far apart, as in a slice of a
            projection's channels. Other strides are copied.
        weights: a tensor [D_i, 1, taps] for each of xs. All have one of the same dtypes and 2, 3 or 4 taps.
        before: for each of xs, the inputs [B, taps - 1, D_i] ahead of it; default zeros. They get no gradient. With
            documents, they are inputs of the first document of each row.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of documents in the flattened B * T tokens: non-decreasing,
            from 0 to B * T. No tap reaches into another document, nor into another row of the batch.

    Returns:
        For each of xs, a contiguous tensor of its shape and dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit or are not supported, or if `before` requires a gradient.
    """
    xs, weights, before = list(xs), list(weights), list(before or [])
    _check(xs, weights, before, cu_seqlens)
    if use_kernels(xs[0]):
        return short_conv_forward(xs, weights, before, cu_seqlens)
    # Widened inputs have their gradients summed in that dtype, too.
    dtype = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    before = [b.to(xs[0].dtype) for b in before]
    ys = reference.short_conv([x.to(dtype) for x in xs], weights, before=before, cu_seqlens=cu_seqlens)
    return [y.to(xs[0].dtype) for y in ys]


def _check(xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None) -> None:
    if not 1 <= len(xs) <= MAX_TENSORS or len(weights) != len(xs) or (before and len(before) != len(xs)):
        raise ValueError(
            f"short_conv takes 1 to {MAX_TENSORS} tensors, a weight for each and, if any, `before` for each; "
            f"got {len(xs)} tensors, {len(weights)} weights, {len(before)} of `before`"
        )
    dtypes = DTYPES if use_kernels(xs[0]) else (*DTYPES, torch.float64)
    taps = weights[0].shape[-1]
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        if x.ndim != 3 or x.shape[:2] != xs[0].shape[:2] or x.shape[2] == 0:
            raise ValueError(f"xs must be [B, T, D_i] with the same B and T and D_i > 0; got {[*x.shape]} at {i}")
        if weight.shape != (x.shape[2], 1, taps) or taps not in TAPS:
            raise ValueError(
                f"weights must be [D_i, 1, taps] with the same number of taps, one of {TAPS}; "
                f"got {[*weight.shape]} at {i} for x {[*x.shape]}"
            )
        if x.dtype != xs[0].dtype or x.dtype not in dtypes:
            raise ValueError(f"xs must have one dtype of {dtypes} on {x.device.type}; got {x.dtype} at {i}")
        if weight.dtype != weights[0].dtype or weight.dtype not in dtypes:
            raise ValueError(f"weights must have one dtype of {dtypes} on {x.device.type}; got {weight.dtype} at {i}")
        if before and before[i].shape != (x.shape[0], taps - 1, x.shape[2]):
            raise ValueError(f"before must be [B, taps - 1, D_i]; got {[*before[i].shape]} at {i} for x {[*x.shape]}")
    if cu_seqlens is not None:
        _check_documents(cu_seqlens)
    if any(b.requires_grad for b in before) and torch.is_grad_enabled():
        raise ValueError("short_conv gives no gradient to `before`; detach it")
    devices = {t.device for t in (*xs, *weights, *before, *([] if cu_seqlens is None else [cu_seqlens]))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {sorted(map(str, devices))}")


def _check_documents(cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [N + 1], N > 0; got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
        )
