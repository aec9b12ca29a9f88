"""Scan the chunks forward: output and final state, and for the backward pass the states and the errors of each chunk.

A program owns one sequence, one value head and BV columns of values. It keeps the transposed state S^T [BV, K] in
registers in float32, so that every product has its left operand in registers and its right one as it is in memory.
With k^ = r k (r = 1/|k|), q^ likewise, gamma_i = exp(g_i), rho_i = exp(g_C - g_i) and C of `chunk_inverse`:

    X = V - gamma r (K S)
    Y = X - C (beta X)                             (what each token found missing; N = beta Y is what it writes)
    O = scale (gamma Q^ S + tril(G . Q^ K^T r) N)
    S' = gamma_C S + K^T (rho r N)

Only beta X is rounded, and X is recovered from it. With one key and beta = 2 the values written then cancel in pairs
without any error, and a reflection is carried over any number of tokens. See arXiv 2412.06464, section 3.3.

With several factors per token, a chunk has 64 steps but fewer queries, each of which reads after the last step of its
token. Q, O and the rows of Q^ K^T are then those of the tokens, and G_ij of row i is that of the step after which it
reads.

With several keys the rounding of rho r N adds up in the state. With SPLIT it is a sum of two numbers of 16 bits, high
and low, each with a product of its own: S' = gamma_C S + K^T high + K^T low.
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
    query_steps,
    result_tiles,
    rows_left,
    sequence_position,
    step_and_back,
    store_result,
)


@triton.jit(do_not_specialize=["T", "R", "scale"])
def chunk_forward_kernel(
    q,
    k,
    v,
    c,
    o,
    y,
    states,
    vectors,
    vector_rows,
    initial_state,
    final_state,
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
    OUTPUT: tl.constexpr,
    SAVE_STATES: tl.constexpr,
    TRANSITION: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SAVE_FINAL: tl.constexpr,
    IS_VARLEN: tl.constexpr,
    IS_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The columns of the state are those of the values and, with TRANSITION, K more that start as the identity and are
    # written nothing: they end as the product of the sequence's transitions. Both begin at the chunk that `reach`
    # names.
    COLUMNS: tl.constexpr = (V + K if TRANSITION else V) // BV
    pid = tl.program_id(0)
    i_v = pid % COLUMNS
    i_h = (pid // COLUMNS) % HV
    i_n = pid // (COLUMNS * HV)
    i_hk = i_h // (HV // H)
    STEPS: tl.constexpr = BT // FACTORS * FACTORS
    bos, length, first_chunk = sequence_position(i_n, cu_seqlens, chunk_starts, T, STEPS, IS_VARLEN)
    is_value = i_v < V // BV
    p_g = vectors + 4 * i_h.to(tl.int64) * R + first_chunk * BT
    dtype = k.dtype

    o_t = tl.arange(0, BT)
    q_t = query_steps(BQ, FACTORS)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    width = COLUMNS * BV
    p_state = (i_n * HV + i_h).to(tl.int64) * K * width + o_k[None, :] * width + o_v[:, None]
    log_scale = tl.log2(scale)
    b_s = tl.zeros([BV, K], tl.float32)  # S^T
    if HAS_INITIAL:
        b_s += tl.load(initial_state + p_state).to(tl.float32)
    first = 0
    if TRANSITION:
        first = tl.load(reach + 3 * (i_n * HV + i_h) + tl.where(is_value, 0, 1))
        is_one = (o_v[:, None] - V == o_k[None, :]) & (first == 0)  # if nothing is left of it, no chunk is scanned
        b_s = tl.where(is_value, b_s, tl.where(is_one, 1.0, 0.0))

    for i_t in tl.range(first, tl.cdiv(length, STEPS), num_stages=STAGES):
        left = rows_left(length, i_t, STEPS, BT, IS_FULL)
        m_t = o_t < left
        row = bos + i_t * STEPS
        q_row = row // FACTORS
        column = (first_chunk + i_t) * BT
        b_k = k.load([row, i_hk * K])
        b_c = c.load([row, i_h * BT])
        if OUTPUT:
            b_q = q.load([q_row, i_hk * K])
        b_v = v.load([row, i_h * V + tl.where(is_value, i_v, 0) * BV])
        b_g = tl.reshape(vector_rows.load([4 * i_h, column]), [BT])
        b_beta = tl.reshape(vector_rows.load([4 * i_h + 1, column]), [BT])
        g_last = tl.load(p_g + i_t * BT + BT - 1)
        # Norms are kept as logarithms (base 2) and join the gates in the exponent: a vector along the columns of an
        # accumulator takes 16 registers, so as few as possible of them are made.
        log_rk = tl.zeros([BT], tl.float32)
        log_rq = tl.zeros([BQ], tl.float32)
        if NORMALIZE:
            log_rk = tl.reshape(vector_rows.load([4 * i_h + 2, column]), [BT])
            if OUTPUT:
                if STAGES > 1 and FACTORS == 1:
                    # |q|^2 is on the diagonal of Q Q^T: the tensor cores are idle, registers are not.
                    b_qq = tl.dot(b_q, tl.trans(b_q), input_precision=PRECISION)
                    b_qq = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_qq, 0.0), 1)
                else:  # Triton 3.6 fails on that product if the load of q is not pipelined; fewer rows cost less
                    b_qq = tl.sum(b_q.to(tl.float32) * b_q.to(tl.float32), 1)
                log_rq = -0.5 * tl.log2(tl.maximum(b_qq, 1e-12))
                if i_v == 0:
                    tl.store(p_g + 3 * R + i_t * BT + q_t, log_rq, mask=None if FACTORS == 1 else q_t < BT)
        b_sh = b_s.to(dtype)
        if OUTPUT:
            # P = scale tril(G . Q^ K^T r)
            log_rq += log_scale
            g_q = at_queries(b_g, BQ, FACTORS)
            decay = decay_between(q_t[:, None] >= o_t[None, :], g_q, b_g, log_rq, log_rk, PRECISION)
            b_p = (tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * decay).to(dtype)
            # O^T = (S^T Q^T) scale gamma + N^T P^T
            b_o = tl.dot(b_sh, tl.trans(b_q), input_precision=PRECISION) * tl.exp2(g_q + log_rq)[None, :]
        if SAVE_STATES:
            states.store([((first_chunk + i_t) * HV + i_h) * V + i_v * BV, 0], b_sh)

        # X^T = V^T - (S^T K^T) gamma r
        b_x = tl.dot(b_sh, tl.trans(b_k), input_precision=PRECISION) * tl.exp2(b_g + log_rk)[None, :]  # [BV, BT]
        if TRANSITION:
            b_x = tl.where(is_value, tl.trans(b_v).to(tl.float32), 0.0) - b_x
        else:
            b_x = tl.trans(b_v).to(tl.float32) - b_x
        # Y^T = X^T - (beta X)^T C^T
        b_w, b_x_used, down = step_and_back(b_x, b_beta, c.dtype)
        b_y = tl.dot(-b_w, tl.trans(b_c), b_x_used, input_precision=PRECISION) * down[:, None]
        if SAVE_STATES:
            b_y_kept = b_y
            if c.dtype == tl.bfloat16:
                # The state needs the rounded X, which cancels; the gradient of beta, a sum of small differences, needs
                # the exact one. Rounded to float16, X is exact enough.
                b_y_kept += b_x - b_x_used
            store_result(y, tl.trans(b_y_kept.to(dtype)), row, i_h * V + i_v * BV, HV * V, m_t, IS_FULL)
        if OUTPUT:
            # + N^T P^T, N = beta Y
            b_o = tl.dot((b_y * b_beta[None, :]).to(dtype), tl.trans(b_p), b_o, input_precision=PRECISION)
            store_result(o, tl.trans(b_o.to(dtype)), q_row, i_h * V + i_v * BV, HV * V, q_t < left, IS_FULL)
        # S'^T = gamma_C S^T + (rho r N)^T K
        rho = tl.exp2(g_last - b_g + log_rk) * b_beta  # beta is 0 past the end of the sequence
        b_n = b_y * rho[None, :]
        b_high = b_n.to(dtype)
        b_s = tl.dot(b_high, b_k, b_s * tl.exp2(g_last), input_precision=PRECISION)
        if SPLIT:
            b_low = (b_n - b_high.to(tl.float32)).to(dtype)
            b_s = tl.dot(b_low, b_k, b_s, input_precision=PRECISION)

    if SAVE_FINAL:
        tl.store(final_state + p_state, b_s)


def launch_chunk_forward(
    call: Call,
    operands: Operands,
    initial: Tensor | None,
    final: Tensor | None,
    o: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    reach: Tensor | None = None,
) -> None:
    """Launch the kernel, as `Backend.forward_scan` says."""
    settings = call.settings.forward_scan
    transition = reach is not None
    columns = (call.V + call.K * transition) // settings.BV
    launch(
        chunk_forward_kernel,
        (columns * call.HV * call.chunks.sequences, 1, 1),
        operands.q if o is not None else None,
        operands.k,
        operands.v,
        operands.c,
        result_tiles(call, o, call.query_rows),
        result_tiles(call, y),
        None if states is None else Tiles(states, settings.BV, call.K),
        operands.vectors,
        operands.vector_rows,
        initial,
        final,
        reach,
        call.cu_seqlens,
        call.chunks.starts,
        call.chunks.seq_len,
        call.R,
        call.scale,
        BQ=call.query_rows,
        OUTPUT=o is not None,
        SAVE_STATES=states is not None,
        TRANSITION=transition,
        HAS_INITIAL=initial is not None,
        SAVE_FINAL=final is not None,
        SPLIT=call.split,
        V=call.V,
        **settings.constants(),
        FACTORS=call.factors,
        **call.sizes,
        **call.flags,
    )
