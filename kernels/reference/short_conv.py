"""Causal depthwise convolution of a few taps, then SiLU, in plain PyTorch.

    z_t = sum_j w_j x_{t-j}       y_t = z_t sigmoid(z_t)        w_j = weight[:, 0, taps - 1 - j]

The kernels of `lrnn/kernels/short_conv/` are tested against it. The file depends on torch alone: it is copied into
exported model folders.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import document_ids


def short_conv(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    before: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """Return silu(causal depthwise convolution over time) of each tensor.

    Args:
        xs: tensors [B, T, D_i], any float dtype.
        weights: a tensor [D_i, 1, taps] for each, any float dtype and any number of taps.
        before: for each the inputs [B, taps - 1, D_i] ahead of x; default zeros. With documents they are inputs of the
            first document of each row.
        cu_seqlens: int32 or int64 [N + 1], boundaries of documents in the flattened B * T tokens; no tap reaches into
            another document.

    Returns:
        For each x a tensor of its shape in float32 (float64 for float64), in which the sums are computed.
    """
    document = None if cu_seqlens is None else document_ids(cu_seqlens, *xs[0].shape[:2])
    ahead: Sequence[Tensor | None] = before or [None] * len(xs)
    return [_convolve(*inputs, document) for inputs in zip(xs, weights, ahead, strict=True)]


def _convolve(x: Tensor, weight: Tensor, before: Tensor | None, document: Tensor | None) -> Tensor:
    T, taps = x.shape[1], weight.shape[-1]
    w = weight[:, 0].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    padded = F.pad(x, (0, 0, taps - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    z = w[:, -1] * x
    for j in range(1, taps):
        shifted = padded[:, taps - 1 - j : taps - 1 - j + T]
        if document is not None:
            first = document[:, :1] if before is not None else torch.full_like(document[:, :1], -1)
            same = document == torch.cat([first.expand(-1, j), document], 1)[:, :T]
            shifted = torch.where(same[..., None], shifted, 0)
        z = z + w[:, -1 - j] * shifted
    return F.silu(z)
