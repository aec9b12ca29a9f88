"""The next token of a (gated) DeltaNet mixer, between its projections, in two kernels: for generation.

    q, k, v = silu(short convolutions)        q^ = q/|q|, k^ = k/|k|        beta = beta_range sigmoid(b)
    S <- exp(g) S + beta k^ (v - exp(g) S^T k^)^T        g = -exp(A_log) softplus(a + dt_bias)
    y = rms_norm(K^-0.5 S^T q^) * norm * silu(gate)

This is equation 10 of arXiv 2412.06464. The first kernel computes the convolutions and moves their window on by a
token. A program of the second owns one sequence and one value head with its whole state, which is read once and written
once, in its place. That is the floor: at K = V = 128 a state is 64 KiB, everything else of a head about 4. All is
computed in float32. In one kernel, Triton gave the state the layout of the convolutions: 1.3 to 2
times as long.

Symbols of the kernels: C channels of q, k and v together, W taps; a tile has BK >= K rows and BV >= V columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch

CHANNELS = 256  # of the convolutions, per program


@triton.jit
def next_inputs_kernel(
    q,
    k,
    v,
    q_taps,
    k_taps,
    v_taps,
    window,
    new_window,
    mixed,
    DK: tl.constexpr,
    DV: tl.constexpr,
    W: tl.constexpr,
    BC: tl.constexpr,
):
    # The convolutions of q, k [B, DK] and v [B, DV] as mixed [B, C], and the window [B, W - 1, C] of the next token.
    i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_k: tl.constexpr = (DK + BC - 1) // BC
    C: tl.constexpr = 2 * DK + DV
    if i_c < blocks_k:
        _convolve(q, q_taps, window, new_window, mixed, i_b, i_c, 0, DK, C, W, BC)
    elif i_c < 2 * blocks_k:
        _convolve(k, k_taps, window, new_window, mixed, i_b, i_c - blocks_k, DK, DK, C, W, BC)
    else:
        _convolve(v, v_taps, window, new_window, mixed, i_b, i_c - 2 * blocks_k, 2 * DK, DV, C, W, BC)


@triton.jit
def _convolve(
    x,
    taps,
    window,
    new_window,
    mixed,
    i_b,
    i_c,
    first,
    D: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BC: tl.constexpr,
):
    # Channels of x [B, D], which are the columns of the window from `first` on.
    o_c = i_c * BC + tl.arange(0, BC)
    mask = o_c < D
    p = i_b * (W - 1) * C + first + o_c
    b_y = tl.zeros([BC], tl.float32)
    for j in tl.static_range(W):
        if j < W - 1:
            b_x = tl.load(window + p + j * C, mask=mask, other=0.0)
        else:
            b_x = tl.load(x + i_b * D + o_c, mask=mask, other=0.0)
        if j > 0:
            tl.store(new_window + p + (j - 1) * C, b_x.to(new_window.dtype.element_ty), mask=mask)
        b_y += b_x.to(tl.float32) * tl.load(taps + o_c * W + j, mask=mask, other=0.0).to(tl.float32)
    tl.store(mixed + i_b * C + first + o_c, b_y * tl.sigmoid(b_y), mask=mask)


@triton.jit(do_not_specialize=["eps", "beta_range", "scale"])
def next_state_kernel(
    mixed,
    a,
    b,
    gate,
    state,
    A_log,
    dt_bias,
    norm,
    y,
    eps,
    beta_range,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    pid = tl.program_id(0)
    i_b, i_h = (pid // HV).to(tl.int64), pid % HV
    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    row = i_b * HV + i_h
    p_state = state + row * K * V + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    b_s = tl.load(p_state, mask=m_s, other=0.0)

    p_k = mixed + i_b * (2 * H * K + HV * V) + i_h // (HV // H) * K + o_k
    b_q = tl.load(p_k, mask=m_k, other=0.0)
    b_k = tl.load(p_k + H * K, mask=m_k, other=0.0)
    b_v = tl.load(mixed + i_b * (2 * H * K + HV * V) + 2 * H * K + i_h * V + o_v, mask=m_v, other=0.0)
    b_q *= tl.rsqrt(tl.maximum(tl.sum(b_q * b_q), 1e-12)) * scale
    b_k *= tl.rsqrt(tl.maximum(tl.sum(b_k * b_k), 1e-12))

    b_beta = beta_range * tl.sigmoid(tl.load(b + row).to(tl.float32))
    if a is not None:
        b_a = tl.load(a + row).to(tl.float32) + tl.load(dt_bias + i_h).to(tl.float32)
        b_a = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))  # softplus
        b_s *= tl.exp(-tl.exp(tl.load(A_log + i_h).to(tl.float32)) * b_a)
    b_n = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))
    b_s += b_k[:, None] * b_n[None, :]
    tl.store(p_state, b_s, mask=m_s)

    b_o = tl.sum(b_s * b_q[:, None], 0)
    b_y = b_o * tl.rsqrt(tl.sum(b_o * b_o) / V + eps) * tl.load(norm + o_v, mask=m_v, other=0.0).to(tl.float32)
    if gate is not None:
        b_g = tl.load(gate + row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_y *= b_g * tl.sigmoid(b_g)
    tl.store(y + row * V + o_v, b_y.to(y.dtype.element_ty), mask=m_v)


@torch.library.custom_op("lrnn::next_token", mutates_args=("state",))
def next_token(
    qkv: Sequence[Tensor],
    a: Tensor | None,
    b: Tensor,
    gate: Tensor | None,
    taps: Sequence[Tensor],
    window: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm: Tensor,
    eps: float,
    beta_range: float,
) -> tuple[Tensor, Tensor]:
    """Apply the short convolutions, the delta rule and the gated norm to one token, and write its state into `state`.

    There are no gradients.

    Args:
        qkv: projections q, k [B, 1, H * K] and v [B, 1, HV * V], bfloat16, float16 or float32.
        a, b: projections [B, 1, HV] for the gate on the state, or None, and for the step size.
        gate: projection [B, 1, HV * V] for the gate on the output, or None.
        taps: weights of the three convolutions, [channels, 1, taps].
        window: inputs of the convolutions ahead of the token, [B, taps - 1, channels of q, k and v].
        state: [B, HV, K, V] float32, contiguous, the state ahead of the token, which is replaced by the one after it.
        A_log, dt_bias: [HV] of the gate on the state, or None.
        norm: weight [V] of the norm of a head's output.
        eps: epsilon of that norm.
        beta_range: factor on the sigmoid of b.

    Returns:
        The output [B, 1, HV * V] in the dtype of v, and the window [B, taps - 1, channels] ahead of the next token.
    """
    B, HV, K, V = state.shape
    q, k, v = (x.contiguous() for x in qkv)
    a, gate = (None if x is None else x.contiguous() for x in (a, gate))
    y, new_window = torch.empty_like(v), torch.empty_like(window, memory_format=torch.contiguous_format)
    DK, DV, W = q.shape[-1], v.shape[-1], taps[0].shape[-1]
    mixed = torch.empty((B, 2 * DK + DV), dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(state):  # does nothing for CPU tensors, in Triton's interpreter
        launch(
            next_inputs_kernel,
            (B, 2 * triton.cdiv(DK, CHANNELS) + triton.cdiv(DV, CHANNELS), 1),
            *(q, k, v, *(weight.contiguous() for weight in taps), window.contiguous(), new_window, mixed),
            **{"DK": DK, "DV": DV, "W": W, "BC": CHANNELS},
            num_warps=4,
            num_stages=1,
        )
        launch(
            next_state_kernel,
            (B * HV, 1, 1),
            *(mixed, a, b.contiguous(), gate, state, A_log, dt_bias, norm, y, eps, beta_range, K**-0.5),
            **{"H": DK // K, "HV": HV, "K": K, "V": V},
            **_tile(K, V),
            num_stages=1,
        )
    return y, new_window


@next_token.register_fake
def _(qkv, a, b, gate, taps, window, state, A_log, dt_bias, norm, eps, beta_range):
    return torch.empty_like(qkv[2]), torch.empty_like(window)


def _tile(K: int, V: int) -> dict[str, int]:
    """Return the tile of a state and the warps that hold it: 128 numbers per thread, up to 16 warps.

    On an H200, two such blocks fit on a multiprocessor, and are faster than one with more warps (docs/results).
    """
    BK, BV = (triton.next_power_of_2(max(size, 16)) for size in (K, V))
    return {"BK": BK, "BV": BV, "num_warps": min(max(BK * BV // 4096, 1), 16)}


def compile_cases(K: int = 128, V: int = 128) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as generation compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    tile = _tile(K, V)
    warps = tile.pop("num_warps")
    sizes = {"DK": 16 * K, "DV": 16 * V, "W": 4, "BC": CHANNELS}
    types = {"state": "*fp32", "A_log": "*fp32", "dt_bias": "*fp32", "mixed": "*fp32"}
    types |= {"eps": "fp32", "beta_range": "fp32", "scale": "fp32"}
    for kernel, constants, num_warps in (
        (next_inputs_kernel, sizes, 4),
        (next_state_kernel, {"H": 16, "HV": 16, "K": K, "V": V, **tile}, warps),
    ):
        signature = {n: types.get(n, "*bf16") for n in kernel.arg_names if n not in constants}
        yield f"{kernel.__name__.removesuffix('_kernel')}_bf16_{K}_{V}", kernel, signature, constants, num_warps, 1
