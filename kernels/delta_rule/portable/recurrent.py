"""Compute the recurrence token by token, for one token or a few, without gradients: for generation.

    S_t = exp(g_t) S_{t-1} + beta_t k^_t (v_t - S_{t-1}^T k^_t exp(g_t))^T        o_t = scale S_t^T q^_t

This is equation 10 of arXiv 2412.06464. A program owns one sequence, one value head and BV columns of values. It
computes everything in float32, without tensor cores.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call
from lrnn.kernels.delta_rule.portable.parts import sequence_position


def recurrent_launch(K: int) -> dict[str, int]:
    """Return the settings of `recurrent`: a program holds K x BV numbers of the state in registers."""
    return {"BV": 32 if K <= 128 else 16, "num_warps": 4}


@triton.jit(do_not_specialize=["T", "scale", "beta_range"])
def recurrent_kernel(
    q,
    k,
    v,
    gate,
    beta,
    A_log,
    dt_bias,
    o,
    initial_state,
    final_state,
    cu_seqlens,
    T,
    scale,
    beta_range,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    FACTORS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATE: tl.constexpr,
    RAW_BETA: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    pid = tl.program_id(0)
    i_v = pid % (V // BV)
    i_h = (pid // (V // BV)) % HV
    i_n = pid // (V // BV * HV)
    i_hk = i_h // (HV // H)
    # There are no chunks here, so the table of first chunks is not read.
    bos, length, _ = sequence_position(i_n, cu_seqlens, cu_seqlens, T, 1, IS_VARLEN)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_state = (i_n * HV + i_h).to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
    b_s = tl.zeros([K, BV], tl.float32)
    if HAS_INITIAL:
        b_s += tl.load(initial_state + p_state).to(tl.float32)
    if GATE == "raw":
        rate = -tl.exp(tl.load(A_log + i_h).to(tl.float32))
        bias = tl.load(dt_bias + i_h).to(tl.float32)
    for i in range(0, length // FACTORS):
        row = (bos // FACTORS + i).to(tl.int64)
        b_q = tl.load(q + (row * H + i_hk) * K + o_k).to(tl.float32)
        if NORMALIZE:
            b_q = b_q * tl.rsqrt(tl.maximum(tl.sum(b_q * b_q), 1e-12))
        if GATE != "none":
            b_g = tl.load(gate + row * HV + i_h).to(tl.float32)
            if GATE == "raw":
                b_a = b_g + bias
                b_g = rate * (tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a))))
            b_s = b_s * tl.exp(b_g)
        for j in tl.static_range(FACTORS):
            step = row * FACTORS + j
            b_k = tl.load(k + (step * H + i_hk) * K + o_k).to(tl.float32)
            b_v = tl.load(v + (step * HV + i_h) * V + o_v).to(tl.float32)
            if NORMALIZE:
                b_k = b_k * tl.rsqrt(tl.maximum(tl.sum(b_k * b_k), 1e-12))
            b_beta = tl.load(beta + step * HV + i_h).to(tl.float32)
            if RAW_BETA:
                b_beta = beta_range * tl.sigmoid(b_beta)
            b_n = b_beta * (b_v - tl.sum(b_s * b_k[:, None], 0))
            b_s = b_s + b_k[:, None] * b_n[None, :]
        b_o = tl.sum(b_s * b_q[:, None], 0) * scale
        tl.store(o + (row * HV + i_h) * V + o_v, b_o.to(o.dtype.element_ty))
    tl.store(final_state + p_state, b_s)


def launch_recurrent(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output by token, [B, tokens, HV, V] in the dtype of v, and the final states [N, HV, K, V] float32."""
    o = call.empty(call.B, call.tokens, call.HV, call.V, dtype=call.dtype)
    final = call.empty(call.states, call.HV, call.K, call.V)
    settings = recurrent_launch(call.K)
    launch(
        recurrent_kernel,
        (call.V // settings["BV"] * call.HV * call.states, 1, 1),
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if gate is None else gate.contiguous(),
        beta.contiguous(),
        A_log,
        dt_bias,
        o,
        None if initial is None else initial.contiguous(),
        final,
        call.cu_seqlens,
        call.T,
        call.scale,
        call.beta_range or 0.0,
        H=call.H,
        HV=call.HV,
        K=call.K,
        V=call.V,
        FACTORS=call.factors,
        NORMALIZE=call.normalize_qk,
        GATE=call.gate,
        RAW_BETA=call.beta_range is not None,
        HAS_INITIAL=initial is not None,
        IS_VARLEN=call.cu_seqlens is not None,
        **settings,
    )
    return o, final
