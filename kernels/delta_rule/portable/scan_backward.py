"""Scan the chunks from the last to the first, for the gradients of the states and of the values.

A program owns one sequence, one value head and BV columns of values, and keeps the transposed gradient dS'^T [BV, K]
of the state that leaves a chunk in float32 registers. In the notation of `chunk_forward`, P = scale tril(G . Q^ K^T r):

    dN = P^T dO + rho r (K dS')
    dW = dN - C^T (beta dN)                        (beta dW is the gradient of V)
    dS = gamma_C dS' - K^T (gamma r beta dW) + Q^^T (scale gamma dO)

Only beta dN is rounded, and dN is recovered from it, as X is in the forward scan. dS' of each chunk is stored for
`chunk_backward`, and so is dX = beta dW, the gradient of V, from which dW is recovered. Where beta is too small for
that (`is_kept_small`), dW is stored in its place. With SPLIT, gamma r beta dW is a sum of two numbers of 16 bits, as
rho r N is in the forward scan. With several factors per token the rows of dO, Q and P are those of the tokens, as
there.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.portable.parts import (
    at_queries,
    decay_between,
    is_kept_small,
    query_steps,
    result_tiles,
    rows_left,
    sequence_position,
    step_and_back,
    store_result,
)


@triton.jit(do_not_specialize=["T", "R", "scale"])
def chunk_scan_backward_kernel(
    q,
    k,
    c,
    do,
    dv,
    dstates,
    vectors,
    vector_rows,
    dfinal,
    dinitial,
    reach,
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
    BQ: tl.constexpr,
    FACTORS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    SAVE_INITIAL: tl.constexpr,
    REACH: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    i_v = pid % (V // BV)
    i_h = (pid // (V // BV)) % HV
    i_n = pid // (V // BV * HV)
    i_hk = i_h // (HV // H)
    STEPS: tl.constexpr = BT // FACTORS * FACTORS
    bos, length, first_chunk = sequence_position(i_n, cu_seqlens, chunk_starts, T, STEPS, IS_VARLEN)
    p_g = vectors + 4 * i_h.to(tl.int64) * R + first_chunk * BT
    dtype = k.dtype

    o_t = tl.arange(0, BT)
    q_t = query_steps(BQ, FACTORS)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    p_state = (i_n * HV + i_h).to(tl.int64) * K * V + o_k[None, :] * V + o_v[:, None]
    b_ds = tl.zeros([BV, K], tl.float32)  # dS'^T
    if HAS_FINAL:
        b_ds += tl.load(dfinal + p_state).to(tl.float32)

    log_scale = tl.log2(scale)
    n_chunks = tl.cdiv(length, STEPS)
    if REACH:
        n_chunks = tl.load(reach + 3 * (i_n * HV + i_h) + 2)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        i_t = n_chunks - 1 - i
        left = rows_left(length, i_t, STEPS, BT, IS_FULL)
        m_t = o_t < left
        m_q = q_t < left
        row = bos + i_t * STEPS
        q_row = row // FACTORS
        column = (first_chunk + i_t) * BT
        b_q = q.load([q_row, i_hk * K])
        b_k = k.load([row, i_hk * K])
        b_c = c.load([row, i_h * BT])
        b_do = do.load([q_row, i_h * V + i_v * BV])
        b_g = tl.reshape(vector_rows.load([4 * i_h, column]), [BT])
        b_beta = tl.reshape(vector_rows.load([4 * i_h + 1, column]), [BT])
        g_last = tl.load(p_g + i_t * BT + BT - 1)
        # As in the forward scan, logarithms of norms join the gates in the exponent.
        log_rk = tl.zeros([BT], tl.float32)
        log_rq = tl.zeros([BQ], tl.float32)
        if NORMALIZE:
            log_rk = tl.reshape(vector_rows.load([4 * i_h + 2, column]), [BT])
            log_rq = at_queries(tl.reshape(vector_rows.load([4 * i_h + 3, column]), [BT]), BQ, FACTORS)
        log_rq += log_scale
        b_dsh = b_ds.to(dtype)
        if SAVE_STATES:
            # In halves: a buffer for the whole would leave room for one program on a multiprocessor, not two.
            left, right = tl.split(tl.permute(tl.reshape(b_dsh, [BV, 2, K // 2]), [0, 2, 1]))
            state_row = ((first_chunk + i_t) * HV + i_h) * V + i_v * BV
            dstates.store([state_row, 0], left)
            dstates.store([state_row, K // 2], right)

        # dN^T = (dS'^T K^T) rho r + dO^T P. Rows of P past the end would bring in another sequence's dO.
        g_q = at_queries(b_g, BQ, FACTORS)
        m_p = (q_t[:, None] >= o_t[None, :]) & m_q[:, None]
        decay = decay_between(m_p, g_q, b_g, log_rq, log_rk, PRECISION)
        b_p = (tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * decay).to(dtype)
        rho = tl.where(m_t, tl.exp2(g_last - b_g + log_rk), 0.0)
        b_dn = tl.dot(b_dsh, tl.trans(b_k), input_precision=PRECISION) * rho[None, :]
        b_dn = tl.dot(tl.trans(b_do), b_p, b_dn, input_precision=PRECISION)  # [BV, BT]
        # dW^T = dN^T - (beta dN)^T C
        b_z, b_dn_used, down = step_and_back(b_dn, b_beta, c.dtype)
        b_dw = tl.dot(-b_z, b_c, b_dn_used, input_precision=PRECISION) * down[:, None]
        if SAVE_STATES:
            b_kept = b_dw
            if c.dtype == tl.bfloat16:  # as in the forward scan
                b_kept += b_dn - b_dn_used
            b_kept *= tl.where(is_kept_small(b_beta, dtype), 1.0, b_beta)[None, :]
            store_result(dv, tl.trans(b_kept.to(dtype)), row, i_h * V + i_v * BV, HV * V, m_t, IS_FULL)
        # dS^T = gamma_C dS'^T - (gamma r beta dW)^T K + (scale gamma dO)^T Q^
        b_du = b_dw * (-tl.exp2(b_g + log_rk) * b_beta)[None, :]
        b_high = b_du.to(dtype)
        b_ds = tl.dot(b_high, b_k, b_ds * tl.exp2(g_last), input_precision=PRECISION)
        if SPLIT:
            b_low = (b_du - b_high.to(tl.float32)).to(dtype)
            b_ds = tl.dot(b_low, b_k, b_ds, input_precision=PRECISION)
        gamma = tl.where(m_q, tl.exp2(g_q + log_rq), 0.0)
        b_doq = (tl.trans(b_do).to(tl.float32) * gamma[None, :]).to(dtype)
        b_ds = tl.dot(b_doq, b_q, b_ds, input_precision=PRECISION)

    if SAVE_INITIAL:
        tl.store(dinitial + p_state, b_ds)


def launch_scan_backward(
    call: Call,
    operands: Operands,
    do: Tensor,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    dv: Tensor | None = None,
    dstates: Tensor | None = None,
    reach: Tensor | None = None,
) -> None:
    """Launch the kernel, as `Backend.backward_scan` says."""
    settings = call.settings.backward_scan
    launch(
        chunk_scan_backward_kernel,
        (call.V // settings.BV * call.HV * call.chunks.sequences, 1, 1),
        operands.q,
        operands.k,
        operands.c,
        Tiles(do, call.query_rows, settings.BV),
        result_tiles(call, dv),
        # The states are stored by halves: a buffer for whole ones would leave too little memory.
        None if dstates is None else Tiles(dstates, settings.BV, call.K // 2),
        operands.vectors,
        operands.vector_rows,
        dfinal,
        dinitial,
        reach,
        call.cu_seqlens,
        call.chunks.starts,
        call.chunks.seq_len,
        call.R,
        call.scale,
        BQ=call.query_rows,
        SAVE_STATES=dstates is not None,
        HAS_FINAL=dfinal is not None,
        SAVE_INITIAL=dinitial is not None,
        REACH=reach is not None,
        SPLIT=call.split,
        V=call.V,
        **settings.constants(),
        FACTORS=call.factors,
        **call.sizes,
        **call.flags,
    )
