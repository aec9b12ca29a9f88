"""Recurrences of token mixers that have no chunkwise form here, in plain PyTorch.

They are Mamba's selective scan (arXiv 2312.00752) and RWKV-7's generalised delta rule (arXiv 2503.14456). Both accept
transitions of either sign. They are computed in float32, or in float64 for float64 inputs, whatever autocast says, in
segments of which the backward pass keeps the first state only. `recurrences.py` decides what runs on kernels instead;
this file is the truth for these. It depends on torch alone: it is copied into exported model folders.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .documents import document_ids, document_starts

SEGMENT = 32  # tokens whose states exist at a time


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    allow_neg_eigval: bool,
    initial_state: Tensor | None = None,
    document: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute Mamba's scan for channel d and state n, with a = exp(dt A), or 2 exp(dt A) - 1 for eigenvalues in [-1, 1]
    (arXiv 2411.12537):

        h_t[d, n] = a_t[d, n] h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]        y_t[d] = sum_n C_t[n] h_t[d, n]

    Args:
        x, dt: [B, T, D]; dt >= 0.
        A: [D, N], at most 0.
        B, C: [B, T, N].
        initial_state: [B, D, N], or None for zeros.
        document: int64 [B, T], the document of each token, at each of which the state is reset; or None. The initial
            state is that ahead of the first document of each row.

    Returns:
        y [B, T, D] and the state h [B, D, N] after the last token.
    """
    x, dt, A, B, C = _wide(x, dt, A, B, C)
    start = None if document is None else document_starts(document, initial_state is not None)

    def segment(h, A, x, dt, B, C, start=None):
        a = (dt[..., None] * A).exp()
        if allow_neg_eigval:
            a = 2 * a - 1
        if start is not None:
            a = a * ~start[..., None, None]
        states = _scan(a, (dt * x)[..., None] * B[:, :, None, :], h)
        return (states @ C[..., None])[..., 0], states[:, -1]

    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _by_segments(lambda h, *parts: segment(h, A, *parts), h, [x, dt, B, C], start)


def rwkv7_recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute RWKV-7's generalised delta rule (arXiv 2503.14456), with the state transposed to [K, V]:

        S_t = (diag(w_t) - (a_t . kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T        o_t = S_t^T r_t

    Args:
        r, w, k, kappa, a: [B, T, H, K]: receptance, decay, key, removal key of norm 1, in-context rate.
        v: [B, T, H, V].
        initial_state: [B, H, K, V], or None for zeros.
        cu_seqlens: int32 or int64 [N + 1], boundaries of documents in the flattened B * T tokens: the state is reset at
            each. Every row must start one; the initial state is that ahead of the first document of each row.

    Returns:
        o [B, T, H, V] and the state [B, H, K, V] after the last token.
    """
    r, w, k, v, kappa, a = _wide(r, w, k, v, kappa, a)
    start = None
    if cu_seqlens is not None:
        start = document_starts(document_ids(cu_seqlens, *r.shape[:2]), initial_state is not None)

    def segment(S, r, w, k, v, kappa, rate, start=None):
        out = []
        for t in range(r.shape[1]):
            if start is not None:
                S = S * ~start[:, t, None, None, None]
            removed = kappa[:, t, :, None, :] @ S
            S = w[:, t, ..., None] * S - rate[:, t, ..., None] * removed + k[:, t, ..., None] * v[:, t, :, None, :]
            out.append((r[:, t, :, None, :] @ S)[..., 0, :])
        return torch.stack(out, 1), S

    S = r.new_zeros(r.shape[0], *r.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(r.dtype)
    with torch.autocast(r.device.type, enabled=False):
        return _by_segments(segment, S, [r, w, k, v, kappa, a * kappa], start)


def _scan(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Return h_t = a_t h_{t-1} + b_t for all t of [B, T, ...] in log2(T) doublings; h [B, ...] is before the first."""
    b = torch.cat([(b[:, 0] + a[:, 0] * h)[:, None], b[:, 1:]], 1)
    reach = 1
    while reach < b.shape[1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    return b


def _by_segments(function: Callable, state: Tensor, inputs: Sequence[Tensor], start: Tensor | None):
    """Run function(state, *inputs of a segment) -> (outputs, state) over inputs [B, T, ...], segment by segment."""
    if start is not None:
        inputs = [*inputs, start]
    outputs = []
    for parts in zip(*(x.split(SEGMENT, 1) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            # Nothing random is inside, and CUDA graphs cannot capture reading the generator's state.
            out, state = checkpoint(function, state, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = function(state, *parts)
        outputs.append(out)
    return torch.cat(outputs, 1), state


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [x.to(dtype) for x in tensors]
