"""Mamba's selective scan in Triton, forward and backward: `reference/steps.py` for CUDA.

    h_t[d, n] = a_t[d, n] h_{t-1}[d, n] + dt_t[d] B_t[n] x_t[d]        y_t[d] = sum_n C_t[n] h_t[d, n]
    a_t = e_t or 2 e_t - 1, e_t = exp(dt_t[d] A[d, n])

    dh_t = C_t dy_t + a_{t+1} dh_{t+1}                     dC_t[n] = sum_d dy_t h_t
    de_t = (1 or 2) e_t dh_t h_{t-1}                       ddt_t[d] = sum_n (de_t A + dh_t B_t x_t)
    dA = sum_t dt_t de_t                                   dx_t[d] = dt_t sum_n dh_t B_t, dB_t[n] = sum_d dh_t dt_t x_t

A program owns some channels of one sequence, keeps their states in registers and walks along the tokens. Everything is
float32. The forward pass stores the state ahead of every SEGMENT tokens. From it, the backward pass computes the states
of a segment again, into a scratch buffer, and walks back over them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.reference.documents import document_starts

SEGMENT = 32  # tokens between stored states
CHANNELS = 32  # per program; with 16 states per channel, each thread of a warp holds 16 numbers
WARPS = 1


@torch.compiler.disable
def selective_scan(x, dt, A, B, C, *, allow_neg_eigval, initial_state=None, document=None) -> tuple[Tensor, Tensor]:
    """Compute `lrnn.kernels.reference.steps.selective_scan` in Triton kernels, in float32.

    The arguments and results are the same. Gradients go to x, dt, A, B, C and the initial state, and are summed in a
    fixed order. A program reads whole rows of B and C, so N should not exceed some hundreds.
    """
    inputs = (y.float().contiguous() for y in (x, dt, A, B, C))
    start = None if document is None else document_starts(document, initial_state is not None).contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    return _SelectiveScan.apply(*inputs, state, start, allow_neg_eigval)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, state, start, allow_neg_eigval):
        y = torch.empty_like(x)
        final = x.new_empty(x.shape[0], *A.shape)
        segments = -(-x.shape[1] // SEGMENT)
        needs_grad = any(ctx.needs_input_grad)
        stored = x.new_empty(x.shape[0], segments, *A.shape) if needs_grad else None
        with torch.cuda.device_of(x):  # does nothing for CPU tensors
            selective_scan_forward_kernel[_grid(x)](
                x=x,
                dt=dt,
                A=A,
                B=B,
                C=C,
                initial_state=state,
                start=start,
                y=y,
                final_state=final,
                stored=stored,
                T=x.shape[1],
                HAS_STATE=state is not None,
                HAS_START=start is not None,
                SAVE=needs_grad,
                NEGATIVE=allow_neg_eigval,
                **_sizes(A),
            )
        ctx.save_for_backward(x, dt, A, B, C, start, stored)
        ctx.allow_neg_eigval, ctx.has_state = allow_neg_eigval, state is not None
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy, dfinal):
        x, dt, A, B, C, start, stored = ctx.saved_tensors
        batch, T, D = x.shape
        N = A.shape[1]
        blocks = triton.cdiv(D, CHANNELS)
        dx, ddt = torch.empty_like(x), torch.empty_like(x)
        dA, dstate = x.new_empty(batch, D, N), x.new_empty(batch, D, N)
        dB, dC = x.new_empty(batch, blocks, T, N), x.new_empty(batch, blocks, T, N)
        scratch = x.new_empty(batch, SEGMENT, D, N)
        with torch.cuda.device_of(x):
            selective_scan_backward_kernel[_grid(x)](
                x=x,
                dt=dt,
                A=A,
                B=B,
                C=C,
                start=start,
                stored=stored,
                scratch=scratch,
                dy=dy.contiguous(),
                dfinal=dfinal.contiguous(),
                dx=dx,
                ddt=ddt,
                dA=dA,
                dB=dB,
                dC=dC,
                dinitial=dstate,
                T=T,
                HAS_START=start is not None,
                NEGATIVE=ctx.allow_neg_eigval,
                **_sizes(A),
            )
        return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dstate if ctx.has_state else None, None, None


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[2], CHANNELS), x.shape[0]


def _sizes(A: Tensor) -> dict[str, int]:
    D, N = A.shape
    return {"D": D, "N": N, "BD": CHANNELS, "BN": triton.next_power_of_2(N), "SEGMENT": SEGMENT, "num_warps": WARPS}


@triton.jit
def _decay(b_e, start, row, HAS_START: tl.constexpr, NEGATIVE: tl.constexpr):
    # a_t [BD, BN] from e_t; 0 at the start of a document.
    b_a = b_e
    if NEGATIVE:
        b_a = 2 * b_e - 1
    if HAS_START:
        b_a = tl.where(tl.load(start + row) != 0, 0.0, b_a)
    return b_a


@triton.jit(do_not_specialize=["T"])
def selective_scan_forward_kernel(
    x,
    dt,
    A,
    B,
    C,
    initial_state,
    start,
    y,
    final_state,
    stored,
    T,
    HAS_STATE: tl.constexpr,
    HAS_START: tl.constexpr,
    SAVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < N
    m_s = m_d[:, None] & m_n[None, :]
    o_s = o_d[:, None] * N + o_n[None, :]
    b_A = tl.load(A + o_s, mask=m_s, other=0.0)
    b_h = tl.zeros([BD, BN], tl.float32)
    if HAS_STATE:
        b_h = tl.load(initial_state + i_b * D * N + o_s, mask=m_s, other=0.0)
    segments = tl.cdiv(T, SEGMENT)
    for i_s in range(0, segments):
        if SAVE:
            tl.store(stored + (i_b * segments + i_s) * D * N + o_s, b_h, mask=m_s)
        for i_t in range(i_s * SEGMENT, tl.minimum(i_s * SEGMENT + SEGMENT, T)):
            row = i_b * T + i_t
            b_x = tl.load(x + row * D + o_d, mask=m_d, other=0.0)
            b_dt = tl.load(dt + row * D + o_d, mask=m_d, other=0.0)
            b_B = tl.load(B + row * N + o_n, mask=m_n, other=0.0)
            b_C = tl.load(C + row * N + o_n, mask=m_n, other=0.0)
            b_a = _decay(tl.exp(b_dt[:, None] * b_A), start, row, HAS_START, NEGATIVE)
            b_h = b_a * b_h + (b_dt * b_x)[:, None] * b_B[None, :]
            tl.store(y + row * D + o_d, tl.sum(b_h * b_C[None, :], 1), mask=m_d)
    tl.store(final_state + i_b * D * N + o_s, b_h, mask=m_s)


@triton.jit(do_not_specialize=["T"])
def selective_scan_backward_kernel(
    x,
    dt,
    A,
    B,
    C,
    start,
    stored,
    scratch,
    dy,
    dfinal,
    dx,
    ddt,
    dA,
    dB,
    dC,
    dinitial,
    T,
    HAS_START: tl.constexpr,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < N
    m_s = m_d[:, None] & m_n[None, :]
    o_s = o_d[:, None] * N + o_n[None, :]
    b_A = tl.load(A + o_s, mask=m_s, other=0.0)
    b_dA = tl.zeros([BD, BN], tl.float32)
    b_dh = tl.load(dfinal + i_b * D * N + o_s, mask=m_s, other=0.0)
    segments = tl.cdiv(T, SEGMENT)
    scratch += i_b * SEGMENT * D * N
    dB += (i_b * tl.num_programs(0) + i_d) * T * N
    dC += (i_b * tl.num_programs(0) + i_d) * T * N
    for i_back in range(0, segments):
        i_s = segments - 1 - i_back
        first = i_s * SEGMENT
        length = tl.minimum(SEGMENT, T - first)
        b_h = tl.load(stored + (i_b * segments + i_s) * D * N + o_s, mask=m_s, other=0.0)
        # Keep the state ahead of each token. Each thread reads only what it wrote itself.
        for i in range(0, length):
            tl.store(scratch + i * D * N + o_s, b_h, mask=m_s)
            row = i_b * T + first + i
            b_x = tl.load(x + row * D + o_d, mask=m_d, other=0.0)
            b_dt = tl.load(dt + row * D + o_d, mask=m_d, other=0.0)
            b_B = tl.load(B + row * N + o_n, mask=m_n, other=0.0)
            b_a = _decay(tl.exp(b_dt[:, None] * b_A), start, row, HAS_START, NEGATIVE)
            b_h = b_a * b_h + (b_dt * b_x)[:, None] * b_B[None, :]
        tl.debug_barrier()
        for j in range(0, length):
            i = length - 1 - j
            row = i_b * T + first + i
            b_x = tl.load(x + row * D + o_d, mask=m_d, other=0.0)
            b_dt = tl.load(dt + row * D + o_d, mask=m_d, other=0.0)
            b_B = tl.load(B + row * N + o_n, mask=m_n, other=0.0)
            b_C = tl.load(C + row * N + o_n, mask=m_n, other=0.0)
            b_dy = tl.load(dy + row * D + o_d, mask=m_d, other=0.0)
            # b_h is the state after the token, b_before the one ahead of it.
            b_before = tl.load(scratch + i * D * N + o_s, mask=m_s, other=0.0)
            tl.store(dC + (first + i) * N + o_n, tl.sum(b_dy[:, None] * b_h, 0), mask=m_n)
            b_dh += b_dy[:, None] * b_C[None, :]
            b_e = tl.exp(b_dt[:, None] * b_A)
            b_a = _decay(b_e, start, row, HAS_START, NEGATIVE)
            b_de = b_dh * b_before * b_e
            if NEGATIVE:
                b_de = 2 * b_de
            if HAS_START:
                b_de = tl.where(tl.load(start + row) != 0, 0.0, b_de)
            b_dA += b_dt[:, None] * b_de
            b_du = tl.sum(b_dh * b_B[None, :], 1)
            tl.store(dx + row * D + o_d, b_dt * b_du, mask=m_d)
            tl.store(ddt + row * D + o_d, tl.sum(b_de * b_A, 1) + b_x * b_du, mask=m_d)
            tl.store(dB + (first + i) * N + o_n, tl.sum(b_dh * (b_dt * b_x)[:, None], 0), mask=m_n)
            b_dh = b_a * b_dh
            b_h = b_before
        tl.debug_barrier()  # the next segment overwrites the scratch buffer
    tl.store(dA + i_b * D * N + o_s, b_dA, mask=m_s)
    tl.store(dinitial + i_b * D * N + o_s, b_dh, mask=m_s)


def compile_cases(D: int = 2048, N: int = 16) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as training compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    types = {"T": "i32", "start": "*i1"}
    constants = {"NEGATIVE": True, "HAS_START": True, "D": D, "N": N, "BD": CHANNELS, "BN": N, "SEGMENT": SEGMENT}
    for name, kernel, own in (
        ("forward", selective_scan_forward_kernel, {"HAS_STATE": True, "SAVE": True}),
        ("backward", selective_scan_backward_kernel, {}),
    ):
        signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in {**constants, **own}}
        yield f"selective_scan_{name}", kernel, signature, {**constants, **own}, WARPS, 3
