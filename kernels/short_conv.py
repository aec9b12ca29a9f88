"""Causal depthwise convolution of a few taps, then SiLU, of up to three tensors in one launch.

    z_t = sum_j w_j x_{t-j}       y_t = z_t sigmoid(z_t)        w_j = weight[:, 0, taps - 1 - j]

    dz_t = dy_t sigmoid(z_t) (1 + z_t (1 - sigmoid(z_t)))       with z_t computed anew
    dx_t = sum_j w_j dz_{t+j}                                   dw_j = sum_t dz_t x_{t-j}

Both kernels are bound by memory. A program owns a column of channels, 16 bytes of them a thread, and walks down a block
of tokens with the last inputs in registers: each input is read once, besides the few rows that blocks share, and the
sums over time of the backward pass need no exchange between threads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.dispatch import use_kernels
from lrnn.kernels.reference.documents import document_ids

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAPS = (2, 3, 4)
MAX_TENSORS = 3
WARPS = 2
LONG_BLOCK, SHORT_BLOCK = 128, 32  # tokens of a program
MANY_TOKENS = 8192  # from here on long blocks fill the GPU


def short_conv(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    before: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """silu(causal depthwise convolution over time) of each tensor; sums in float32 (float64 for float64, on CPU).

    On CUDA one Triton kernel forward and one backward for all tensors; on CPU `short_conv_reference`. Only the inputs
    are kept for the backward pass. The gradients of the weights are summed in a fixed order.

    Args:
        xs: one to three tensors [B, T, D_i] of one dtype: bfloat16, float16 or float32 (float64 on CPU). Read in place
            where the channels are contiguous and all B * T rows equally far apart, as in a slice of a projection's
            channels; copied otherwise.
        weights: a tensor [D_i, 1, taps] for each, of one of the same dtypes, with taps from 2 to 4, the same for all.
        before: for each the inputs [B, taps - 1, D_i] ahead of x; default zeros. They get no gradient.
        cu_seqlens: int32 or int64 [N + 1], boundaries of documents in the flattened B * T tokens, from 0 to B * T,
            non-decreasing; no tap reaches into another document, nor into another row of the batch. Not with `before`.

    Returns:
        For each x a contiguous tensor of its shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit or are not supported, `before` that requires a gradient,
            or `before` together with `cu_seqlens`.
    """
    xs, weights, before = list(xs), list(weights), list(before or [])
    _check(xs, weights, before, cu_seqlens)
    if use_kernels(xs[0]):
        return torch.ops.lrnn.short_conv_forward(xs, weights, before, cu_seqlens)
    return short_conv_reference(xs, weights, before=before, cu_seqlens=cu_seqlens)


def short_conv_reference(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    before: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> list[Tensor]:
    """`short_conv` in plain PyTorch, with the same arguments; any number of tensors and taps."""
    ys = []
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        B, T, _ = x.shape
        taps = weight.shape[-1]
        w, padded = weight[:, 0].to(dtype), F.pad(x.to(dtype), (0, 0, taps - 1, 0))
        if before:
            padded = torch.cat([before[i].to(x.dtype).to(dtype), x.to(dtype)], 1)
        document = None if cu_seqlens is None else document_ids(cu_seqlens, B, T)
        z = w[:, -1] * padded[:, taps - 1 :]
        for j in range(1, taps):
            shifted = padded[:, taps - 1 - j : taps - 1 - j + T]
            if document is not None:
                same = document == F.pad(document, (j, 0), value=-1)[:, :T]
                shifted = torch.where(same[..., None], shifted, 0)
            z = z + w[:, -1 - j] * shifted
        ys.append(F.silu(z).to(x.dtype))
    return ys


def _check(xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None) -> None:
    if not 1 <= len(xs) <= MAX_TENSORS or len(weights) != len(xs) or (before and len(before) != len(xs)):
        raise ValueError(
            f"short_conv takes 1 to {MAX_TENSORS} tensors, a weight for each and, if any, `before` for each; "
            f"got {len(xs)} tensors, {len(weights)} weights, {len(before)} of `before`"
        )
    on_gpu = use_kernels(xs[0])
    dtypes = DTYPES if on_gpu else (*DTYPES, torch.float64)
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
        if before:
            raise ValueError("before and cu_seqlens exclude each other: every document starts from zeros")
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be int32 or int64 [N + 1], N > 0; got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
            )
    if any(b.requires_grad for b in before) and torch.is_grad_enabled():
        raise ValueError("short_conv gives no gradient to `before`; detach it")
    devices = {t.device for t in (*xs, *weights, *before, *([] if cu_seqlens is None else [cu_seqlens]))}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {sorted(map(str, devices))}")


@triton.jit
def _choose(i_c, a0, a1, a2, C0: tl.constexpr, C1: tl.constexpr):
    # what belongs to the i_c-th column of channels: the first tensor has C0 columns, the second C1
    if i_c < C0:
        a = a0
    elif i_c < C0 + C1:
        a = a1
    else:
        a = a2
    return a


@triton.jit
def _load_taps(w, o_d, m_d, W: tl.constexpr, BD: tl.constexpr):
    # weight [D, W] -> w_0 (of the newest input), w_1, w_2, w_3, [BD] each; those past the last tap are of no use
    o_w = tl.arange(0, 4)
    b_w = tl.load(w + o_d[:, None] * W + o_w[None, :], mask=m_d[:, None] & (o_w[None, :] < W), other=0.0)
    b_even, b_odd = tl.split(tl.reshape(b_w.to(tl.float32), [BD, 2, 2]))
    b_0, b_2 = tl.split(b_even)
    b_1, b_3 = tl.split(b_odd)
    if W == 4:
        return b_3, b_2, b_1, b_0
    elif W == 3:
        return b_2, b_1, b_0, b_3
    else:
        return b_1, b_0, b_2, b_3


@triton.jit
def _store_taps(dw, o_d, m_d, b_dw0, b_dw1, b_dw2, b_dw3, W: tl.constexpr, BD: tl.constexpr):
    # the reverse of _load_taps
    if W == 4:
        b_dw = tl.join(tl.join(b_dw3, b_dw1), tl.join(b_dw2, b_dw0))
    elif W == 3:
        b_dw = tl.join(tl.join(b_dw2, b_dw0), tl.join(b_dw1, b_dw3))
    else:
        b_dw = tl.join(tl.join(b_dw1, b_dw2), tl.join(b_dw0, b_dw3))
    o_w = tl.arange(0, 4)
    m_w = m_d[:, None] & (o_w[None, :] < W)
    tl.store(dw + o_d[:, None] * W + o_w[None, :], tl.reshape(b_dw, [BD, 4]), mask=m_w)


@triton.jit
def _documents(cu_seqlens, N, row, rows):
    # Of the flattened rows from `row` on, at most 128: where the document of the first one starts, where that of the
    # last one ends, and two words whose bits tell which rows start a document.
    start = tl.full([], 0, tl.int64)
    stop = tl.full([], 1 << 62, tl.int64)
    low = tl.full([], 0, tl.int64)
    high = tl.full([], 0, tl.int64)
    for i in range(0, N + 1, 256):
        o_n = i + tl.arange(0, 256)
        b_c = tl.load(cu_seqlens + o_n, mask=o_n <= N, other=0).to(tl.int64)
        b_next = tl.load(cu_seqlens + o_n + 1, mask=o_n < N, other=-1).to(tl.int64)
        m_c = (o_n <= N) & (b_c != b_next)  # an empty document repeats a boundary, and bits must be added once
        start = tl.maximum(start, tl.max(tl.where(m_c & (b_c <= row), b_c, 0), 0))
        stop = tl.minimum(stop, tl.min(tl.where(m_c & (b_c >= row + rows), b_c, 1 << 62), 0))
        o_r = b_c - row
        b_bit = tl.full([256], 1, tl.int64) << (o_r & 63)
        low += tl.sum(tl.where(m_c & (o_r >= 0) & (o_r < 64), b_bit, 0), 0)
        high += tl.sum(tl.where(m_c & (o_r >= 64) & (o_r < 128), b_bit, 0), 0)
    return start, stop, low, high


@triton.jit
def _age(age, low, high, i):
    # tokens of its document ahead of the i-th row, given what the row before would have without a boundary
    starts = (tl.where(i < 64, low, high) >> (i & 63)) & 1
    return tl.where(starts == 1, 0, age)


@triton.jit
def _same_document(age, b_1, b_2, b_3):
    # what belongs to the row 1, 2 or 3 rows back, zero if that one is of another document
    return tl.where(age >= 1, b_1, 0.0), tl.where(age >= 2, b_2, 0.0), tl.where(age >= 3, b_3, 0.0)


@triton.jit
def _channels(o_d, D, inside):
    # mask of the channels that exist, all False in a row that is not `inside`. (A scalar condition and-ed to a mask is
    # the same for the compiler, but goes wrong in the interpreter of Triton 3.9.)
    return o_d < tl.where(inside, D, 0)


@triton.jit
def _load_row(x, t, end, S, o_d, D):
    # row t [BD], zero from `end` on
    return tl.load(x + t.to(tl.int64) * S + o_d, mask=_channels(o_d, D, t < end), other=0.0)


@triton.jit
def _load_pair(x, t, end, S, o_d, D):
    return _load_row(x, t, end, S, o_d, D), _load_row(x, t + 1, end, S, o_d, D)


@triton.jit
def _load_before(x, before, i_b, t, S, SB, o_d, D, W: tl.constexpr, HAS_BEFORE: tl.constexpr):
    # row t of a sequence; those ahead of its start come from `before` or are zero
    b_x = tl.load(x + t.to(tl.int64) * S + o_d, mask=_channels(o_d, D, t >= 0), other=0.0).to(tl.float32)
    if HAS_BEFORE:
        row = i_b.to(tl.int64) * (W - 1) + (W - 1) + t
        b_x += tl.load(before + row * SB + o_d, mask=_channels(o_d, D, (t < 0) & (t >= 1 - W)), other=0.0).to(
            tl.float32
        )
    return b_x


@triton.jit
def _convolve(b_x0, b_x1, b_x2, b_x3, b_w0, b_w1, b_w2, b_w3, W: tl.constexpr):
    # z_t = sum_j w_j x_{t-j}
    b_z = b_w0 * b_x0 + b_w1 * b_x1
    if W > 2:
        b_z += b_w2 * b_x2
    if W > 3:
        b_z += b_w3 * b_x3
    return b_z


@triton.jit
def _activation_gradient(b_z, b_dy):
    # dz = dy sigmoid(z) (1 + z (1 - sigmoid(z)))
    b_s = tl.sigmoid(b_z)
    return b_dy.to(tl.float32) * b_s * (1.0 + b_z * (1.0 - b_s))


@triton.jit
def _scatter(b_dz, b_dz1, b_dz2, b_dz3, b_a1, b_a2, b_a3, b_w0, b_w1, b_w2, b_w3, W: tl.constexpr):
    # dx_{t-j} += w_j dz_t, with b_aj what dx_{t-j} has so far. This completes dx_{t-W+1}; the rest moves on by a row.
    if W == 4:
        return b_a3 + b_w3 * b_dz3, b_w0 * b_dz, b_a1 + b_w1 * b_dz1, b_a2 + b_w2 * b_dz2
    elif W == 3:
        return b_a2 + b_w2 * b_dz2, b_w0 * b_dz, b_a1 + b_w1 * b_dz1, b_a3
    else:
        return b_a1 + b_w1 * b_dz1, b_w0 * b_dz, b_a2, b_a3


@triton.jit(do_not_specialize=["T", "NT", "N"])
def short_conv_forward_kernel(
    x0,
    x1,
    x2,
    w0,
    w1,
    w2,
    before0,
    before1,
    before2,
    y0,
    y1,
    y2,
    cu_seqlens,
    T,
    NT,
    N,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    SB0: tl.constexpr,
    SB1: tl.constexpr,
    SB2: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    C0: tl.constexpr = (D0 + BD - 1) // BD
    C1: tl.constexpr = (D1 + BD - 1) // BD
    C2: tl.constexpr = (D2 + BD - 1) // BD
    i_c = tl.program_id(0) % (C0 + C1 + C2)
    i_bt = tl.program_id(0) // (C0 + C1 + C2)
    i_b, i_t = i_bt // NT, i_bt % NT
    o_d = (i_c - _choose(i_c, 0, C0, C0 + C1, C0, C1)) * BD + tl.arange(0, BD)
    D = _choose(i_c, D0, D1, D2, C0, C1)
    S = _choose(i_c, S0, S1, S2, C0, C1)
    m_d = o_d < D
    bos = i_b.to(tl.int64) * T
    x = _choose(i_c, x0, x1, x2, C0, C1) + bos * S
    y = _choose(i_c, y0, y1, y2, C0, C1) + bos * D
    b_w0, b_w1, b_w2, b_w3 = _load_taps(_choose(i_c, w0, w1, w2, C0, C1), o_d, m_d, W, BD)
    if HAS_BEFORE:
        before = _choose(i_c, before0, before1, before2, C0, C1)
        SB = _choose(i_c, SB0, SB1, SB2, C0, C1)
    else:
        before, SB = x, S

    t0 = i_t * BT
    rows = tl.minimum(BT, T - t0)
    end = t0 + rows
    if IS_VARLEN:
        start, _, low, high = _documents(cu_seqlens, N, bos + t0, rows)
        age = bos + t0 - start
    b_x1 = _load_before(x, before, i_b, t0 - 1, S, SB, o_d, D, W, HAS_BEFORE)
    b_x2 = _load_before(x, before, i_b, t0 - 2, S, SB, o_d, D, W, HAS_BEFORE)
    b_x3 = _load_before(x, before, i_b, t0 - 3, S, SB, o_d, D, W, HAS_BEFORE)
    for i in range(0, rows, 4):
        t = t0 + i
        # Four loads together, so that enough are under way.
        b_r0, b_r1 = _load_pair(x, t, end, S, o_d, D)
        b_r2, b_r3 = _load_pair(x, t + 2, end, S, o_d, D)
        b_xs = (b_r0, b_r1, b_r2, b_r3)
        for r in tl.static_range(4):
            b_x0 = b_xs[r].to(tl.float32)
            if IS_VARLEN:
                age = _age(age, low, high, i + r)
                b_x1, b_x2, b_x3 = _same_document(age, b_x1, b_x2, b_x3)
                age += 1
            b_z = _convolve(b_x0, b_x1, b_x2, b_x3, b_w0, b_w1, b_w2, b_w3, W)
            b_y = b_z * tl.sigmoid(b_z)
            tl.store(
                y + (t + r).to(tl.int64) * D + o_d, b_y.to(y.dtype.element_ty), mask=_channels(o_d, D, t + r < end)
            )
            b_x3, b_x2, b_x1 = b_x2, b_x1, b_x0


@triton.jit(do_not_specialize=["T", "NT", "N"])
def short_conv_backward_kernel(
    x0,
    x1,
    x2,
    w0,
    w1,
    w2,
    before0,
    before1,
    before2,
    dy0,
    dy1,
    dy2,
    dx0,
    dx1,
    dx2,
    dw_parts,
    cu_seqlens,
    T,
    NT,
    N,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    SB0: tl.constexpr,
    SB1: tl.constexpr,
    SB2: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    C0: tl.constexpr = (D0 + BD - 1) // BD
    C1: tl.constexpr = (D1 + BD - 1) // BD
    C2: tl.constexpr = (D2 + BD - 1) // BD
    i_c = tl.program_id(0) % (C0 + C1 + C2)
    i_bt = tl.program_id(0) // (C0 + C1 + C2)
    i_b, i_t = i_bt // NT, i_bt % NT
    o_d = (i_c - _choose(i_c, 0, C0, C0 + C1, C0, C1)) * BD + tl.arange(0, BD)
    D = _choose(i_c, D0, D1, D2, C0, C1)
    S = _choose(i_c, S0, S1, S2, C0, C1)
    m_d = o_d < D
    bos = i_b.to(tl.int64) * T
    x = _choose(i_c, x0, x1, x2, C0, C1) + bos * S
    dy = _choose(i_c, dy0, dy1, dy2, C0, C1) + bos * D
    dx = _choose(i_c, dx0, dx1, dx2, C0, C1) + bos * D
    b_w0, b_w1, b_w2, b_w3 = _load_taps(_choose(i_c, w0, w1, w2, C0, C1), o_d, m_d, W, BD)
    if HAS_BEFORE:
        before = _choose(i_c, before0, before1, before2, C0, C1)
        SB = _choose(i_c, SB0, SB1, SB2, C0, C1)
    else:
        before, SB = x, S

    t0 = i_t * BT
    rows = tl.minimum(BT, T - t0)
    end = t0 + rows
    last = T
    if IS_VARLEN:
        start, stop, low, high = _documents(cu_seqlens, N, bos + t0, rows)
        age = bos + t0 - start
        last = tl.minimum(stop - bos, T).to(tl.int32)
    b_x1 = _load_before(x, before, i_b, t0 - 1, S, SB, o_d, D, W, HAS_BEFORE)
    b_x2 = _load_before(x, before, i_b, t0 - 2, S, SB, o_d, D, W, HAS_BEFORE)
    b_x3 = _load_before(x, before, i_b, t0 - 3, S, SB, o_d, D, W, HAS_BEFORE)
    b_a1 = tl.zeros([BD], tl.float32)
    b_a2 = tl.zeros([BD], tl.float32)
    b_a3 = tl.zeros([BD], tl.float32)
    b_dw0 = tl.zeros([BD], tl.float32)
    b_dw1 = tl.zeros([BD], tl.float32)
    b_dw2 = tl.zeros([BD], tl.float32)
    b_dw3 = tl.zeros([BD], tl.float32)
    for i in range(0, rows, 2):  # by four, registers would spill
        b_xs = _load_pair(x, t0 + i, end, S, o_d, D)
        b_dys = _load_pair(dy, t0 + i, end, D, o_d, D)
        for r in tl.static_range(2):
            b_x0 = b_xs[r].to(tl.float32)
            if IS_VARLEN:
                age = _age(age, low, high, i + r)
                b_x1, b_x2, b_x3 = _same_document(age, b_x1, b_x2, b_x3)
            b_z = _convolve(b_x0, b_x1, b_x2, b_x3, b_w0, b_w1, b_w2, b_w3, W)
            b_dz = _activation_gradient(b_z, b_dys[r])
            # dw_j += dz_t x_{t-j}
            b_dw0 += b_dz * b_x0
            b_dw1 += b_dz * b_x1
            b_dw2 += b_dz * b_x2
            b_dw3 += b_dz * b_x3
            b_dz1, b_dz2, b_dz3 = b_dz, b_dz, b_dz
            if IS_VARLEN:
                b_dz1, b_dz2, b_dz3 = _same_document(age, b_dz, b_dz, b_dz)
                age += 1
            b_dx, b_a1, b_a2, b_a3 = _scatter(b_dz, b_dz1, b_dz2, b_dz3, b_a1, b_a2, b_a3, b_w0, b_w1, b_w2, b_w3, W)
            t = t0 + i + r - (W - 1)
            m_t = _channels(o_d, D, (t >= t0) & (t < end))
            tl.store(dx + t.to(tl.int64) * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_t)
            b_x3, b_x2, b_x1 = b_x2, b_x1, b_x0
    column = _choose(i_c, 0, D0, D0 + D1, C0, C1) + o_d
    _store_taps(dw_parts + i_bt.to(tl.int64) * ((D0 + D1 + D2) * W), column, m_d, b_dw0, b_dw1, b_dw2, b_dw3, W, BD)

    # The last rows also take from those behind the block, as far as their document goes.
    behind = t0 + tl.cdiv(rows, 2) * 2
    for r in tl.static_range(W - 1):
        b_x0 = _load_row(x, behind + r, last, S, o_d, D).to(tl.float32)
        b_dy = _load_row(dy, behind + r, last, D, o_d, D)
        if IS_VARLEN:
            b_x1, b_x2, b_x3 = _same_document(age, b_x1, b_x2, b_x3)
        b_z = _convolve(b_x0, b_x1, b_x2, b_x3, b_w0, b_w1, b_w2, b_w3, W)
        b_dz = _activation_gradient(b_z, b_dy)
        b_dz1, b_dz2, b_dz3 = b_dz, b_dz, b_dz
        if IS_VARLEN:
            b_dz1, b_dz2, b_dz3 = _same_document(age, b_dz, b_dz, b_dz)
            age += 1
        b_dx, b_a1, b_a2, b_a3 = _scatter(b_dz, b_dz1, b_dz2, b_dz3, b_a1, b_a2, b_a3, b_w0, b_w1, b_w2, b_w3, W)
        t = behind + r - (W - 1)
        m_t = _channels(o_d, D, (t >= t0) & (t < end))
        tl.store(dx + t.to(tl.int64) * D + o_d, b_dx.to(dx.dtype.element_ty), mask=m_t)
        b_x3, b_x2, b_x1 = b_x2, b_x1, b_x0


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, D] and the distance of its B * T rows; a copy where they do not lie evenly."""
    B, T, D = x.shape
    step = x.stride(0) if T == 1 else x.stride(1)
    even = B == 1 or T == 1 or x.stride(0) == T * step
    if even and (D == 1 or x.stride(2) == 1):
        return x, step
    return x.contiguous(), D


def _three(items: list, filler: Any) -> list:
    return items + [filler] * (MAX_TENSORS - len(items))


def _block(tokens: int) -> int:
    return LONG_BLOCK if tokens >= MANY_TOKENS else SHORT_BLOCK


def _launch(kernel, xs, weights, before, cu_seqlens, tensors: dict[str, list[Tensor]], **others) -> None:
    """`kernel` on the arguments of both passes and on `tensors`, lists by the arguments' name less the number."""
    B, T, _ = xs[0].shape
    BT = _block(B * T)
    BD = 16 // xs[0].element_size() * 32 * WARPS
    xs, steps = zip(*map(_rows, xs), strict=True)
    tensors = {"x": list(xs), "w": [w.contiguous() for w in weights], **tensors}
    steps_before: tuple[int, ...] = ()
    if before:
        before, steps_before = zip(*(_rows(b.to(xs[0].dtype)) for b in before), strict=True)
        tensors["before"] = list(before)
    else:
        others |= dict.fromkeys(("before0", "before1", "before2"))
    widths = [x.shape[2] for x in xs]
    for name, items in tensors.items():
        others |= {f"{name}{i}": x for i, x in enumerate(_three(items, items[0]))}
    for name, numbers in (("D", widths), ("S", list(steps)), ("SB", list(steps_before))):
        others |= {f"{name}{i}": n for i, n in enumerate(_three(numbers, 0))}
    programs = B * triton.cdiv(T, BT) * sum(triton.cdiv(D, BD) for D in widths)
    if programs == 0:
        return
    with torch.cuda.device_of(xs[0]):  # does nothing for CPU tensors, in Triton's interpreter
        kernel[(programs,)](
            **others,
            cu_seqlens=cu_seqlens,
            T=T,
            NT=triton.cdiv(T, BT),
            N=None if cu_seqlens is None else cu_seqlens.numel() - 1,
            W=weights[0].shape[-1],
            BT=BT,
            BD=BD,
            HAS_BEFORE=bool(before),
            IS_VARLEN=cu_seqlens is not None,
            num_warps=WARPS,
            num_stages=1,
        )


@torch.library.custom_op("lrnn::short_conv_forward", mutates_args=())
def _forward(xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    _launch(short_conv_forward_kernel, xs, weights, before, cu_seqlens, {"y": ys})
    return ys


@_forward.register_fake
def _(xs, weights, before, cu_seqlens):
    return [x.new_empty(x.shape) for x in xs]


@torch.library.custom_op("lrnn::short_conv_backward", mutates_args=())
def _backward(
    dys: list[Tensor], xs: list[Tensor], weights: list[Tensor], before: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """The gradient of each x, and at the end that of all weights, float32 [sum of D_i, taps]."""
    B, T, _ = xs[0].shape
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    # One number a block of tokens, added up afterwards: atomic additions would come in any order.
    shape = (B * triton.cdiv(T, _block(B * T)), sum(x.shape[2] for x in xs), weights[0].shape[-1])
    parts = torch.empty(shape, dtype=torch.float32, device=xs[0].device)
    tensors = {"dy": [dy.contiguous() for dy in dys], "dx": dxs}
    _launch(short_conv_backward_kernel, xs, weights, before, cu_seqlens, tensors, dw_parts=parts)
    return [*dxs, parts.sum(0)]


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


def compile_cases(D: int = 2048) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """The kernels as they are compiled in training, to be compiled for a GPU that is not there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for packed in (False, True):
            constants: dict[str, Any] = dict.fromkeys(("before0", "before1", "before2"))
            for i in range(MAX_TENSORS):
                constants |= {f"D{i}": D, f"S{i}": D, f"SB{i}": 0}
            constants |= {"W": 4, "BT": LONG_BLOCK, "BD": 16 // size * 32 * WARPS}
            constants |= {"HAS_BEFORE": False, "IS_VARLEN": packed}
            constants |= {} if packed else {"cu_seqlens": None, "N": None}
            types = {"w0": "*fp32", "w1": "*fp32", "w2": "*fp32", "dw_parts": "*fp32", "cu_seqlens": "*i32"}
            types |= {"T": "i32", "NT": "i32", "N": "i32"}
            for name, kernel in (("forward", short_conv_forward_kernel), ("backward", short_conv_backward_kernel)):
                signature = {n: types.get(n, f"*{dtype}") for n in kernel.arg_names if n not in constants}
                suffix = f"{dtype}_packed" if packed else dtype
                yield f"short_conv_{name}_{suffix}", kernel, signature, constants, WARPS, 1
