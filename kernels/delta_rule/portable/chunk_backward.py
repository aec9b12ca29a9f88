"""Compute the gradients inside all chunks at once: those of q, k, v and beta, and the parts of the gate's.

There are two programs per chunk and value head: one for dq, one for dk, dbeta and the rest of dv. They follow
each other in the grid, so that what both read comes from the second-level cache the second time. In the notation of
`chunk_forward` and `chunk_scan_backward` (Y, dX, S and dS' are read; N = beta Y, dX = beta dW; rows i, columns j):

    dP = scale G . (dO N^T)  (i >= j)             dM = -G . (dX N^T)  (i > j)
    dq^ = scale gamma (dO S^T) + dP K^
    dk^ = [-gamma (dX S^T) + dM K^] + [dM^T K^ + dP^T Q^] + [rho (N dS'^T)]
    dv = dX                                       dbeta = rowsum(dW . Y)
    dg = <q^, dq^> + <k^, first bracket> - <k^, the other two>,   and on the last token + <S', dS'>

dg is the gradient of the accumulated log-gate; <S', dS'> = gamma_C <S, dS'> + sum <k^, third bracket>. Where keys and
queries are normalised, dk = r (dk^ - k^ <k^, dk^>), and dq likewise.

dv is complete already, except for tokens with small step sizes (`is_kept_small`), for which dW is kept in its place.

With several factors per token, rows i of dO, dq^ and dP are those of the tokens, as in the forward scan.

The accumulators hold rq dq^ and r dk^, so that both programs round the same numbers, dP' = rq dP r. The token's own
part of <q^, dq^> and <k^, dk^>, which no gate touches, then cancels in dg, however small the rest is.
"""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.launch import launch
from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.portable.parts import (
    at_queries,
    chunk_position,
    is_kept_small,
    query_steps,
    rows_left,
)

FLOORED = tl.constexpr(0.99e6)  # 1/|x| where |x| is floored at 1e-6: there x^ is linear in x


@triton.jit
def _norm_factor(log_r, t, BT: tl.constexpr, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        return tl.exp2(tl.load(log_r + t))
    else:
        return tl.full([BT], 1.0, tl.float32)


@triton.jit
def _query_part(
    q, k, do, y, states, dstates, dq, dot_q, head, i_c, i_h, i_hk, row, q_row, q_t, m_q, last, g_last,
    b_g, g_q, b_beta, rq, rk, scale,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_t = tl.arange(0, BT)
    o_q = tl.arange(0, BQ)
    o_k = tl.arange(0, K)
    dtype = k.dtype
    b_dq = tl.zeros([BQ, K], tl.float32)
    b_dp = tl.zeros([BQ, BT], tl.float32)
    b_ss = 0.0  # <S, dS'>
    for i_v in tl.range(0, V // BV, num_stages=STAGES):
        b_do = do.load([q_row, i_h * V + i_v * BV])
        b_y = y.load([row, i_h * V + i_v * BV])
        b_s = states.load([(i_c * HV + i_h) * V + i_v * BV, 0])
        b_ds = dstates.load([(i_c * HV + i_h) * V + i_v * BV, 0])
        b_dp = tl.dot(b_do, tl.trans(b_y), b_dp, input_precision=PRECISION)  # dO Y^T
        b_dq = tl.dot(b_do, b_s, b_dq, input_precision=PRECISION)  # dO S^T
        b_ss += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32))
    # rq dq^ = scale gamma rq (dO S^T) + dP' K
    m_p = (q_t[:, None] >= o_t[None, :]) & m_q[:, None]
    decay = tl.exp2(tl.where(m_p, g_q[:, None] - b_g[None, :], 0.0))
    b_dp = tl.where(m_p, b_dp * decay * (b_beta * rk)[None, :] * (rq * scale)[:, None], 0.0).to(dtype)
    b_k = k.load([row, i_hk * K])
    b_dq = tl.dot(b_dp, b_k, b_dq * (tl.exp2(g_q) * rq * scale)[:, None], input_precision=PRECISION)
    b_q = q.load([q_row, i_hk * K]).to(tl.float32)
    b_dot = tl.sum(b_q * b_dq, 1)
    tl.store(dot_q + head + q_t, b_dot + tl.where(q_t == last, b_ss * tl.exp2(g_last), 0.0), mask=m_q)
    if NORMALIZE:
        b_dq = b_dq - b_q * (rq * rq * tl.where(rq < FLOORED, b_dot, 0.0))[:, None]
    p_dq = dq + ((q_row + o_q[:, None]).to(tl.int64) * HV + i_h) * K + o_k[None, :]
    tl.store(p_dq, b_dq.to(dtype), mask=m_q[:, None])


@triton.jit
def _key_part(
    q, k, do, dx, y, states, dstates, dk, dv, dbeta, dot_k, head, i_c, i_h, i_hk, row, q_row, t, m_t, q_t, m_q,
    last, g_last, b_g, g_q, b_beta, rq, rk, scale,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, FACTORS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    dtype = k.dtype
    # The products [BT, BT] come first, then [BT, K], in separate loops: together they do not fit into registers.
    b_dm = tl.zeros([BT, BT], tl.float32)  # dX Y^T
    b_dmt = tl.zeros([BT, BT], tl.float32)  # its transpose, computed, because transposing an accumulator costs more
    b_dpt = tl.zeros([BT, BQ], tl.float32)  # Y dO^T
    b_dbeta = tl.zeros([BT], tl.float32)
    for i_v in tl.range(0, V // BV, num_stages=STAGES):
        b_dx = dx.load([row, i_h * V + i_v * BV])
        b_y = y.load([row, i_h * V + i_v * BV])
        b_do = do.load([q_row, i_h * V + i_v * BV])
        b_dm = tl.dot(b_dx, tl.trans(b_y), b_dm, input_precision=PRECISION)
        b_dmt = tl.dot(b_y, tl.trans(b_dx), b_dmt, input_precision=PRECISION)
        b_dpt = tl.dot(b_y, tl.trans(b_do), b_dpt, input_precision=PRECISION)
        b_dbeta += tl.sum(b_dx.to(tl.float32) * b_y.to(tl.float32), 1)
    # For tokens with small step sizes dW is where the others have dX (`scan_backward`).
    is_small = is_kept_small(b_beta, dtype)
    tl.store(dbeta + head + t, b_dbeta / tl.where(is_small, 1.0, b_beta), mask=m_t)
    dx_r = tl.where(is_small, b_beta, 1.0) * rk
    # dM' = -r_i G . (dX N^T) r_j, rows i; its transpose and that of dP', rows j
    m_m = (o_t[:, None] > o_t[None, :]) & m_t[:, None]
    decay = tl.exp2(tl.where(m_m, b_g[:, None] - b_g[None, :], 0.0))
    beta_r = b_beta * rk
    b_dm = tl.where(m_m, b_dm * decay * -dx_r[:, None] * beta_r[None, :], 0.0).to(dtype)
    m_p = (q_t[None, :] >= o_t[:, None]) & m_q[None, :]
    m_m = (o_t[None, :] > o_t[:, None]) & m_t[None, :]
    if FACTORS == 1:  # then both have the same decays
        decay = tl.exp2(tl.where(m_p, b_g[None, :] - b_g[:, None], 0.0))
    else:
        decay = tl.exp2(tl.where(m_m, b_g[None, :] - b_g[:, None], 0.0))
    b_dmt = tl.where(m_m, b_dmt * decay * -beta_r[:, None] * dx_r[None, :], 0.0).to(dtype)
    if FACTORS > 1:
        decay = tl.exp2(tl.where(m_p, g_q[None, :] - b_g[:, None], 0.0))
    b_dpt = tl.where(m_p, b_dpt * decay * beta_r[:, None] * (rq * scale)[None, :], 0.0).to(dtype)

    # r dk^ = -gamma r (dX S^T) + dM' K. Rows are scaled after the products of the loops: Triton before 3.8 writes the
    # next left operand in registers over one that the tensor cores may still read (its issue 9433).
    b_dk = tl.zeros([BT, K], tl.float32)
    for i_v in tl.range(0, V // BV, num_stages=STAGES):
        b_dx = dx.load([row, i_h * V + i_v * BV])
        b_s = states.load([(i_c * HV + i_h) * V + i_v * BV, 0])
        b_dk = tl.dot(b_dx, b_s, b_dk, input_precision=PRECISION)
    b_k = k.load([row, i_hk * K])
    b_dk = tl.dot(b_dm, b_k, b_dk * (-tl.exp2(b_g) * dx_r)[:, None], input_precision=PRECISION)
    dot_left = tl.sum(b_dk * k.load([row, i_hk * K]).to(tl.float32), 1)
    # + dM'^T K + dP'^T Q
    b_dk = tl.dot(b_dmt, b_k, b_dk, input_precision=PRECISION)
    b_dk = tl.dot(b_dpt, q.load([q_row, i_hk * K]), b_dk, input_precision=PRECISION)
    dot_inside = tl.sum(b_dk * k.load([row, i_hk * K]).to(tl.float32), 1)
    # + rho r N dS'^T
    b_end = tl.zeros([BT, K], tl.float32)
    for i_v in tl.range(0, V // BV, num_stages=STAGES):
        b_y = y.load([row, i_h * V + i_v * BV])
        b_ds = dstates.load([(i_c * HV + i_h) * V + i_v * BV, 0])
        b_end = tl.dot(b_y, b_ds, b_end, input_precision=PRECISION)
    rho = tl.where(m_t, tl.exp2(g_last - b_g), 0.0)
    b_dk += b_end * (beta_r * rho)[:, None]
    b_k32 = k.load([row, i_hk * K]).to(tl.float32)
    dot = tl.sum(b_dk * b_k32, 1)
    at_end = tl.sum(tl.where(m_t, dot - dot_inside, 0.0))
    tl.store(dot_k + head + t, 2.0 * dot_left - dot + tl.where(t == last, at_end, 0.0), mask=m_t)
    if NORMALIZE:
        b_dk = b_dk - b_k32 * (rk * rk * tl.where(rk < FLOORED, dot, 0.0))[:, None]
    p_dk = dk + ((row + o_t[:, None]).to(tl.int64) * HV + i_h) * K + o_k[None, :]
    tl.store(p_dk, b_dk.to(dtype), mask=m_t[:, None])

    # dv of small step sizes comes last, because dW is read where it is written.
    m_small = m_t & is_small
    if tl.max(m_small.to(tl.int32), 0) > 0:
        p_dv = dv + ((row + o_t[:, None]).to(tl.int64) * HV + i_h) * V + tl.arange(0, BV)[None, :]
        for i_v in range(0, V, BV):
            b_dw = tl.load(p_dv + i_v, mask=m_small[:, None], other=0.0).to(tl.float32)
            tl.store(p_dv + i_v, (b_dw * b_beta[:, None]).to(dtype), mask=m_small[:, None])


@triton.jit(do_not_specialize=["T", "R", "scale"])
def chunk_backward_kernel(
    q,
    k,
    do,
    dx,
    y,
    states,
    dstates,
    dq,
    dk,
    dv,
    dbeta,
    dot_q,
    dot_k,
    vectors,
    cu_seqlens,
    chunk_table,
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
    IS_VARLEN: tl.constexpr,
    IS_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    i_h = (pid // 2) % HV
    i_c = pid // (2 * HV)
    STEPS: tl.constexpr = BT // FACTORS * FACTORS
    i_n, i_t, bos, length = chunk_position(i_c, cu_seqlens, chunk_table, T, STEPS, IS_VARLEN)
    if i_n < 0:
        return
    i_hk = i_h // (HV // H)
    row = bos + i_t * STEPS
    q_row = row // FACTORS
    t = tl.arange(0, BT)
    q_t = query_steps(BQ, FACTORS)
    left = rows_left(length, i_t, STEPS, BT, IS_FULL)
    m_t = t < left
    m_q = q_t < left
    last = tl.minimum(length - i_t * STEPS, STEPS) - 1
    head = i_h.to(tl.int64) * R + i_c * BT
    p_g = vectors + 4 * i_h.to(tl.int64) * R + i_c * BT
    b_g = tl.load(p_g + t)
    g_q = at_queries(b_g, BQ, FACTORS)
    b_beta = tl.load(p_g + R + t)
    g_last = tl.load(p_g + BT - 1)
    rk = _norm_factor(p_g + 2 * R, t, BT, NORMALIZE)
    rq = at_queries(_norm_factor(p_g + 3 * R, t, BT, NORMALIZE), BQ, FACTORS)
    if pid % 2 == 0:
        _query_part(
            q, k, do, y, states, dstates, dq, dot_q, head, i_c, i_h, i_hk, row, q_row, q_t, m_q, last, g_last,
            b_g, g_q, b_beta, rq, rk, scale, HV, K, V, BT, BV, BQ, NORMALIZE, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _key_part(
            q, k, do, dx, y, states, dstates, dk, dv, dbeta, dot_k, head, i_c, i_h, i_hk, row, q_row, t, m_t, q_t, m_q,
            last, g_last, b_g, g_q, b_beta, rq, rk, scale, HV, K, V, BT, BV, BQ, FACTORS, NORMALIZE, PRECISION, STAGES,
        )  # fmt: skip


def launch_chunk_backward(
    call: Call,
    operands: Operands,
    do: Tensor,
    dv: Tensor,
    y: Tensor,
    states: Tensor,
    dstates: Tensor,
    dq: Tensor,
    dk: Tensor,
    dbeta: Tensor,
    dot_q: Tensor,
    dot_k: Tensor,
) -> None:
    """Launch the kernel, as `Backend.chunk_backward` says."""
    settings = call.settings.inside_chunks
    launch(
        chunk_backward_kernel,
        (2 * call.HV * call.chunks.count, 1, 1),
        operands.q,
        operands.k,
        Tiles(do, call.query_rows, settings.BV),
        *(Tiles(x, CHUNK, settings.BV) for x in (dv, y)),
        *(Tiles(x, settings.BV, call.K) for x in (states, dstates)),
        dq,
        dk,
        dv,
        dbeta,
        dot_q,
        dot_k,
        operands.vectors,
        call.cu_seqlens,
        call.chunks.table,
        call.chunks.seq_len,
        call.R,
        call.scale,
        BQ=call.query_rows,
        V=call.V,
        **settings.constants(),
        FACTORS=call.factors,
        **call.sizes,
        **call.flags,
    )
