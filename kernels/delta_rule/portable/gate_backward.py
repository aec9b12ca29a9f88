"""Turn the gradients that `chunk_backward` leaves into those of gates and step sizes, raw or not.

    d(log gate)_t = sum over the tokens i >= t of the chunk of d(accumulated log-gate)_i
    raw gate, g = -exp(A_log) softplus(a + dt_bias):      da = -dg exp(A_log) sigmoid(a + dt_bias), a token's d(dt_bias)
                                                          dg g, a token's d(A_log)
    raw step size, beta = range sigmoid(b):               db = dbeta beta (1 - beta / range)

With several factors per token, dbeta and the sum over tokens are by step, and a token's gate is that of its first step.
The sums over all tokens that A_log and dt_bias need are left as one number per chunk and head, so that their order is
fixed. A program takes BH heads of a chunk, because raw gates and step sizes of neighbouring heads are side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.portable.parts import chunk_position, rows_left

GATE_BACKWARD = {"BH": 16, "num_warps": 4}


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
    BH: tl.constexpr,
    FACTORS: tl.constexpr,
    GATE: tl.constexpr,
    RAW_BETA: tl.constexpr,
    IS_VARLEN: tl.constexpr,
):
    # sums [2, HV, chunks]: the parts of the gradients of A_log and of dt_bias
    STEPS: tl.constexpr = BT // FACTORS * FACTORS
    i_c = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < HV
    if GATE == "raw":
        p_sums = sums + o_h * chunks + i_c
    i_n, i_t, bos, length = chunk_position(i_c, cu_seqlens, chunk_table, T, STEPS, IS_VARLEN)
    if i_n < 0:
        if GATE == "raw":
            tl.store(p_sums, tl.zeros([BH], tl.float32), mask=m_h)
            tl.store(p_sums + HV * chunks, tl.zeros([BH], tl.float32), mask=m_h)
        return
    o_t = tl.arange(0, BT)
    mask = (o_t < rows_left(length, i_t, STEPS, BT, False))[:, None] & m_h[None, :]
    numbers = o_h[None, :].to(tl.int64) * R + i_c * BT + o_t[:, None]  # of the chunk's steps, by head
    steps = (bos + i_t * STEPS + o_t).to(tl.int64)
    places = steps[:, None] * HV + o_h[None, :]
    b_dbeta = tl.load(dbeta + numbers, mask=mask, other=0.0)
    if RAW_BETA:
        b_beta = tl.load(vectors + (3 * o_h[None, :] + 1).to(tl.int64) * R + numbers, mask=mask, other=0.0)
        b_dbeta = b_dbeta * b_beta * (1.0 - b_beta / beta_range)
    tl.store(dbeta_out + places, b_dbeta.to(dbeta_out.dtype.element_ty), mask=mask)
    if GATE != "none":
        m_q = mask
        if FACTORS > 1:  # a token's last step has its query's part
            m_q &= (o_t % FACTORS == FACTORS - 1)[:, None]
        b_dg = tl.load(dot_q + numbers, mask=m_q, other=0.0) + tl.load(dot_k + numbers, mask=mask, other=0.0)
        b_dg = tl.cumsum(b_dg, 0, reverse=True)
        if FACTORS > 1:
            mask &= (o_t % FACTORS == 0)[:, None]
            places = (steps // FACTORS)[:, None] * HV + o_h[None, :]
        if GATE == "raw":
            b_a = tl.load(gate + places, mask=mask, other=0.0).to(tl.float32)
            b_a += tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
            rate = -tl.exp(tl.load(A_log + o_h, mask=m_h, other=0.0).to(tl.float32))[None, :]
            softplus = tl.maximum(b_a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_a)))
            b_dg = tl.where(mask, b_dg, 0.0)
            tl.store(p_sums, tl.sum(b_dg * rate * softplus, 0), mask=m_h)
            b_dg = b_dg * rate * tl.sigmoid(b_a)
            tl.store(p_sums + HV * chunks, tl.sum(b_dg, 0), mask=m_h)
        tl.store(dgate_out + places, b_dg.to(dgate_out.dtype.element_ty), mask=mask)


def launch_gate_backward(
    call: Call,
    operands: Operands,
    dbeta: Tensor,
    dot_q: Tensor,
    dot_k: Tensor,
    gate: Tensor | None,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `gate`, of `beta`, and of A_log and dt_bias [2, HV] float32, from what
    `Backend.chunk_backward` leaves in `dbeta`, `dot_q` and `dot_k`. They are empty where there is no such input."""
    dgate_out = call.empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    dbeta_out = torch.empty_like(beta, memory_format=torch.contiguous_format)
    sums = call.empty(2, call.HV, call.chunks.count) if call.gate == "raw" else None
    launch(
        gate_backward_kernel,
        (call.chunks.count, triton.cdiv(call.HV, GATE_BACKWARD["BH"]), 1),
        dot_q,
        dot_k,
        dbeta,
        None if gate is None else gate.contiguous(),
        operands.vectors,
        A_log,
        dt_bias,
        dgate_out,
        dbeta_out,
        sums,
        call.cu_seqlens,
        call.chunks.table,
        call.chunks.count,
        call.chunks.seq_len,
        call.R,
        call.beta_range or 0.0,
        HV=call.HV,
        BT=CHUNK,
        FACTORS=call.factors,
        GATE=call.gate,
        RAW_BETA=call.beta_range is not None,
        IS_VARLEN=call.cu_seqlens is not None,
        **GATE_BACKWARD,
    )
    return dgate_out, dbeta_out, call.empty(2, 0) if sums is None else sums.sum(-1)
