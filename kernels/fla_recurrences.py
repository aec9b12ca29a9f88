"""Recurrences on fla's kernels (flash-linear-attention 0.6.0), for operands in 16 bits on CUDA.

`recurrences.py` says when they are used and where the arguments and results are described. Nothing is read back from
the GPU, except with documents in RWKV-7, where fla does so once for every `cu_seqlens`.

The mLSTM runs as a diagonal recurrence here. `mlstm_kernels`, the kernels of its authors, do not fit: they take the
forget gate as a logit and compute its log-sigmoid, which excludes 2f - 1, and they take no documents.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fla.ops.gla import chunk_gla
from fla.ops.rwkv7 import chunk_rwkv7
from fla.ops.simple_gla import chunk_simple_gla
from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1
from torch import Tensor

from lrnn.kernels.reference.diagonal import check
from lrnn.kernels.reference.documents import document_ids, document_starts, states_of_documents, states_of_rows

FORGET = -100.0  # a log-decay that leaves nothing: e^-100 is below float32
COLUMNS = 16  # head sizes are padded to its multiples, since fla refuses odd ones, such as the V + 1 of the mLSTM
TF32 = 2.0**-10  # relative error of a product of float32 operands on the tensor cores
# For one decay per head, fla has separate kernels. It refuses their backward pass where Triton miscompiles it: on
# Hopper, before Triton 3.7.1. There, the decay is repeated over the key dimension, for the kernels of GLA.
ONE_NUMBER_KERNELS = not (IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1)


def diagonal_recurrence(
    q, k, v, g, sign=None, *, scale=1.0, initial_state=None, output_final_state=False, document=None
) -> tuple[Tensor, Tensor | None]:
    """Compute the recurrence by `chunk_gla` or, with one decay per head, by `chunk_simple_gla`.

    Signs are folded into q and k, which is exact. fla sums g in float32 over 64 tokens and exponentiates differences,
    which are at most 0 where they count. So no decay is too strong, and log-decays of -20 (2a - 1 near 0) cost no
    accuracy that 16 bits have; sums of 1e4 would cost 3e-4. A document starts with a decay of e^-100.

    `chunk_gla` computes the gradient of g as a difference of sums of tf32 products, which has an absolute error. If
    2a - 1 is near 0, this error would be divided by |2a - 1|, and a few tokens would drown all others. With signs, the
    gradient of g is therefore damped by |a|^2 / (|a|^2 + TF32^2). If a is evenly spread, an error of some percent
    remains.
    """
    check(q, k, v, g, sign)
    K, V, dtype = q.shape[3], v.shape[3], q.dtype
    with torch.autocast(q.device.type, enabled=False):
        g = g.float()
        if document is not None:
            starts = document_starts(document, initial_state is not None)
            g = torch.where(starts[..., None, None], FORGET, g)
        if sign is not None:
            running = sign.float().cumprod(1)
            q, k = q * running.to(dtype), k * running.to(k.dtype)
        q, k, v = (_padded(x.to(dtype)) for x in (q, k, v))
        state = None
        if initial_state is not None:
            state = F.pad(initial_state.float(), (0, v.shape[3] - V, 0, k.shape[3] - K))
        if g.shape[-1] == 1 and ONE_NUMBER_KERNELS:
            rule, g = chunk_simple_gla, g[..., 0]
        else:
            if sign is not None:
                g = _DampedGradient.apply(g)
            rule, g = chunk_gla, g.expand_as(q) if g.shape[-1] == 1 else _padded(g)
        o, state = rule(q, k, v, g, scale=scale, initial_state=state, output_final_state=output_final_state)
        if not output_final_state:
            return o[..., :V], None
        state = state[..., :K, :V]
        return o[..., :V], state if sign is None else state * running[:, -1, :, :, None]


def rwkv7_recurrence(r, w, k, v, kappa, a, *, initial_state=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by `chunk_rwkv7`.

    The decay w must be at least 0.01, since fla exponentiates sums of up to 16 values of -log w. (RWKV-7's w is above
    0.54.)

    kappa and a . kappa are rounded. The eigenvalue along kappa would be off by the rounding of |kappa|^2, by the same
    amount in every step with that key, and near -1 the state would grow. So a . kappa is computed from the rounded
    kappa, divided by its square. What remains is the rounding of a . kappa itself, about 2e-4 in bfloat16.
    """
    B, T = r.shape[:2]
    K, V, dtype = r.shape[3], v.shape[3], r.dtype
    with torch.autocast(r.device.type, enabled=False):
        kappa = kappa.to(dtype)
        # The square has no gradient, since the caller's a . kappa does not depend on the norm.
        square = kappa.detach().float().square().sum(-1, keepdim=True).clamp(min=1e-12)
        erased = (-a.float() * kappa.float() / square).to(dtype)
        inputs = [_padded(x) for x in (r, w.float().log(), k.to(dtype), v.to(dtype), kappa, erased)]
        state = None
        if initial_state is not None:
            state = F.pad(initial_state.float(), (0, inputs[3].shape[3] - V, 0, inputs[0].shape[3] - K))
        if cu_seqlens is not None:
            inputs = [x.flatten(0, 1)[None] for x in inputs]
            document = document_ids(cu_seqlens, B, T)
            state = states_of_documents(state, cu_seqlens, document)
        o, state = chunk_rwkv7(*inputs, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            state = states_of_rows(state, document)
        return o.view(B, T, *o.shape[2:])[..., :V], state[..., :K, :V]


def _padded(x: Tensor) -> Tensor:
    """Pad the last dimension with zeros to a multiple of COLUMNS."""
    return F.pad(x, (0, -x.shape[-1] % COLUMNS))


class _DampedGradient(torch.autograd.Function):
    """Return the input, with a gradient multiplied by e^2g / (e^2g + TF32^2)."""

    @staticmethod
    def forward(ctx: Any, g):
        ctx.save_for_backward(g)
        return g.view_as(g)

    @staticmethod
    def backward(ctx: Any, dg):
        (g,) = ctx.saved_tensors
        square = (2 * g).exp()
        return dg * (square / (square + TF32**2))
