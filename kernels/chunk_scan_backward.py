"""The scan of the backward pass, from the last chunk to the first: the gradients of the states and of the values.

A program owns one sequence, one value head and BV columns of values, and keeps the transposed gradient dS'^T [BV, K] of
the state that leaves a chunk in float32 registers. In the notation of `chunk_forward`, with P = scale tril(G . Q^ K^T r):

    dN = P^T dO + rho r (K dS')
    Z  = beta dN              dW = dN - C^T Z          dX = Z - beta (C^T Z)      (= beta dW, the gradient of V)
    dS = gamma_C dS' - K^T (gamma r dX) + Q^^T (scale gamma dO)

Z is rounded once, as W is in the forward scan. dS' of each chunk and dW are stored for `chunk_backward`.
"""

import triton
import triton.language as tl

from lrnn.kernels.tiles import sequence_position


@triton.jit(do_not_specialize=["T", "R", "scale"])
def chunk_scan_backward_kernel(
    q,
    k,
    c,
    do,
    dw,
    dstates,
    g,
    beta,
    log_r_k,
    log_r_q,
    dfinal,
    dinitial,
    cu_seqlens,
    chunk_starts,
    T,
    R,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    SAVE_INITIAL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    i_v = pid % (V // BV)
    i_h = (pid // (V // BV)) % HV
    i_n = pid // (V // BV * HV)
    i_hk = i_h // (HV // H)
    bos, length, first_chunk = sequence_position(i_n, cu_seqlens, chunk_starts, T, BT, IS_VARLEN)
    head = i_h.to(tl.int64) * R + bos
    g += head
    beta += head
    dtype = k.dtype

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_state = (i_n * HV + i_h).to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
    b_ds = tl.zeros([BV, K], tl.float32)  # dS'^T
    if HAS_FINAL:
        b_ds += tl.load(dfinal + p_state).to(tl.float32)

    n_chunks = tl.cdiv(length, BT)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        i_t = n_chunks - 1 - i
        t = i_t * BT + o_t
        m_t = t < length
        row = bos + i_t * BT
        b_q = q.load([row, i_hk * K])
        b_k = k.load([row, i_hk * K])
        b_c = c.load([row, i_h * BT])
        b_do = do.load([row, i_h * V + i_v * BV])
        b_g = tl.load(g + t, mask=m_t, other=0.0)
        b_beta = tl.load(beta + t, mask=m_t, other=0.0)
        g_last = tl.load(g + tl.minimum(i_t * BT + BT, length) - 1)
        # As in the forward scan, logarithms of norms join the gates in the exponent.
        log_rk = tl.zeros([BT], tl.float32)
        log_rq = tl.zeros([BT], tl.float32)
        if NORMALIZE:
            log_rk = tl.load(log_r_k + head + t, mask=m_t, other=0.0)
            log_rq = tl.load(log_r_q + head + t, mask=m_t, other=0.0)
        b_dsh = b_ds.to(dtype)
        if SAVE_STATES:
            dstates.store([((first_chunk + i_t) * HV + i_h) * V + i_v * BV, 0], b_dsh)

        # dN^T = (dS'^T K^T) rho r + dO^T P; rows of P past the end would bring in another sequence's dO
        m_p = (o_t[:, None] >= o_t[None, :]) & m_t[:, None]
        decay = tl.exp2(tl.where(m_p, (b_g + log_rq)[:, None] - (b_g - log_rk)[None, :], float("-inf")))
        b_p = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_p = (b_p * (decay * scale)).to(dtype)
        rho = tl.where(m_t, tl.exp2(g_last - b_g + log_rk), 0.0)
        b_dn = tl.dot(b_dsh, tl.trans(b_k), input_precision=PRECISION) * rho[None, :]
        b_dn = tl.dot(tl.trans(b_do), b_p, b_dn, input_precision=PRECISION)  # [BV, BT]
        # (C^T Z)^T = Z^T C
        b_z = (b_dn * b_beta[None, :]).to(dtype)
        b_cz = tl.dot(b_z, b_c, input_precision=PRECISION)
        if SAVE_STATES:
            p_dw = dw + ((bos + t[:, None]).to(tl.int64) * HV + i_h) * V + o_v[None, :]
            tl.store(p_dw, tl.trans((b_dn - b_cz).to(dtype)), mask=m_t[:, None])
        b_dx = b_z.to(tl.float32) - b_cz * b_beta[None, :]
        # dS^T = gamma_C dS'^T - (gamma r dX)^T K + (scale gamma dO)^T Q^
        b_du = (b_dx * -tl.exp2(b_g + log_rk)[None, :]).to(dtype)
        b_ds = tl.dot(b_du, b_k, b_ds * tl.exp2(g_last), input_precision=PRECISION)
        gamma = tl.where(m_t, tl.exp2(b_g + log_rq) * scale, 0.0)
        b_doq = (tl.trans(b_do).to(tl.float32) * gamma[None, :]).to(dtype)
        b_ds = tl.dot(b_doq, b_q, b_ds, input_precision=PRECISION)

    if SAVE_INITIAL:
        tl.store(dinitial + p_state, b_ds)
