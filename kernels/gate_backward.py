"""From the gradients that `chunk_backward` leaves to those of gates and step sizes, raw or not.

    d(log gate)_t = sum over the tokens i >= t of the chunk of d(accumulated log-gate)_i
    raw gate, g = -exp(A_log) softplus(a + dt_bias):      da = -dg exp(A_log) sigmoid(a + dt_bias), a token's d(dt_bias)
                                                          dg g, a token's d(A_log)
    raw step size, beta = range sigmoid(b):               db = dbeta beta (1 - beta / range)

The sums over all tokens that A_log and dt_bias need are left as one number a chunk and head, so that their order is
fixed.
"""

import triton
import triton.language as tl

from lrnn.kernels.tiles import chunk_position


@triton.jit(do_not_specialize=["chunks", "T", "R", "beta_range"])
def gate_backward_kernel(
    dot_q,
    dot_k,
    dbeta,
    gate,
    vectors,
    A_log,
    dt_bias,
    dgate_out,
    dbeta_out,
    sums,
    cu_seqlens,
    chunk_table,
    chunks,
    T,
    R,
    beta_range,
    HV: tl.constexpr,
    BT: tl.constexpr,
    GATE: tl.constexpr,
    RAW_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    # sums [2, HV, chunks]: the parts of the gradients of A_log and of dt_bias
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    if GATE == "raw":
        p_sums = sums + i_h * chunks + i_c
    i_n, i_t, bos, length = chunk_position(i_c, cu_seqlens, chunk_table, T, BT, IS_VARLEN)
    if i_n < 0:
        if GATE == "raw":
            tl.store(p_sums, 0.0)
            tl.store(p_sums + HV * chunks, 0.0)
        return
    o_t = tl.arange(0, BT)
    m_t = i_t * BT + o_t < length
    row = (bos + i_t * BT + o_t).to(tl.int64)
    head = i_h.to(tl.int64) * R + i_c * BT
    b_dbeta = tl.load(dbeta + head + o_t, mask=m_t, other=0.0)
    if RAW_BETA:
        b_beta = tl.load(vectors + (4 * i_h.to(tl.int64) + 1) * R + i_c * BT + o_t)
        b_dbeta = b_dbeta * b_beta * (1.0 - b_beta / beta_range)
    tl.store(dbeta_out + row * HV + i_h, b_dbeta.to(dbeta_out.dtype.element_ty), mask=m_t)
    if GATE != "none":
        b_dg = tl.load(dot_q + head + o_t, mask=m_t, other=0.0) + tl.load(dot_k + head + o_t, mask=m_t, other=0.0)
        b_dg = tl.cumsum(b_dg, 0, reverse=True)
        if GATE == "raw":
            b_a = tl.load(gate + row * HV + i_h, mask=m_t, other=0.0).to(tl.float32)
            b_a += tl.load(dt_bias + i_h).to(tl.float32)
            rate = -tl.exp(tl.load(A_log + i_h).to(tl.float32))
            softplus = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))
            b_dg = tl.where(m_t, b_dg, 0.0)
            tl.store(p_sums, tl.sum(b_dg * rate * softplus))
            b_dg = b_dg * rate * tl.sigmoid(b_a)
            tl.store(p_sums + HV * chunks, tl.sum(b_dg))
        tl.store(dgate_out + row * HV + i_h, b_dg.to(dgate_out.dtype.element_ty), mask=m_t)
