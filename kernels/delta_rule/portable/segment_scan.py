"""Join the segments that a long sequence was cut into: find the states in which they start, one after the other.

The transition M_i [K, K] of each segment i, and its end state from zero E_i [K, V], are known:

    forward:    S_0 = initial state       S_{i+1} = M_i S_i + E_i
    backward:   D_n = d(final state)      D_i = M_i^T D_{i+1} + D'_i

where D_i is the gradient of the state before segment i, and D'_i the same from that segment's outputs alone. A program
owns BV columns of one sequence and value head. What it stores for a segment it loads again for the next one. Products
have float32 accuracy (tf32x3).
"""

import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call


def segment_scan_launch(K: int) -> dict[str, int]:
    """Return the settings of `segment_scan`: keys per product, columns of values per program, warps."""
    return {"BK": min(K, 128), "BV": 32, "num_warps": 8}


@triton.jit
def _step(
    to, state, ends, transitions, row, o_v,
    K: tl.constexpr, V: tl.constexpr, E_STRIDE: tl.constexpr, M_STRIDE: tl.constexpr, BK: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    # to = M state + E, or M^T state + D'
    o_k = tl.arange(0, BK)
    for i_k in tl.static_range(0, K, BK):
        b_s = tl.load(ends + (row + i_k + o_k[:, None]) * E_STRIDE + o_v[None, :])
        for j_k in tl.static_range(0, K, BK):
            if BACKWARD:
                b_m = tl.load(transitions + (row + j_k + o_k[None, :]) * M_STRIDE + i_k + o_k[:, None])
            else:
                b_m = tl.load(transitions + (row + i_k + o_k[:, None]) * M_STRIDE + j_k + o_k[None, :])
            b_state = tl.load(state + (j_k + o_k[:, None]) * V + o_v[None, :])
            b_s = tl.dot(b_m, b_state, b_s, input_precision="tf32x3")
        tl.store(to + (i_k + o_k[:, None]) * V + o_v[None, :], b_s)
    tl.debug_barrier()


@triton.jit
def segment_scan_kernel(
    joined,
    ends,
    transitions,
    start,
    last,
    segments,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    E_STRIDE: tl.constexpr,
    M_STRIDE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_START: tl.constexpr,
    SAVE_LAST: tl.constexpr,
):
    # joined [B, segments, HV, K, V] gets the states before the segments, or the gradients of those after them; last [B,
    # HV, K, V] gets what comes after the last step. Rows of E (D') and of M are E_STRIDE and M_STRIDE apart.
    i_v, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    sequence = (i_b * HV + i_h).to(tl.int64) * K
    stride: tl.constexpr = -HV * K if BACKWARD else HV * K  # rows to the segment that comes next
    row = ((i_b * segments + (segments - 1 if BACKWARD else 0)) * HV + i_h).to(tl.int64) * K
    for i_k in tl.static_range(0, K, BK):
        o_s = (i_k + o_k[:, None]) * V + o_v[None, :]
        b_s = tl.zeros([BK, BV], tl.float32)
        if HAS_START:
            b_s += tl.load(start + sequence * V + o_s)
        tl.store(joined + row * V + o_s, b_s)
    tl.debug_barrier()
    for _ in range(segments - 1):
        state = joined + row * V
        _step(state + stride * V, state, ends, transitions, row, o_v, K, V, E_STRIDE, M_STRIDE, BK, BACKWARD)
        row += stride
    if SAVE_LAST:
        state, to = joined + row * V, last + sequence * V
        _step(to, state, ends, transitions, row, o_v, K, V, E_STRIDE, M_STRIDE, BK, BACKWARD)


def join_segments(
    call: Call,
    joined: Tensor,
    ends: Tensor,
    segment_ends: Tensor,
    start: Tensor | None,
    last: Tensor | None,
    *,
    backward: bool,
) -> None:
    """Find the states in which segments start, or the gradients of those in which they end.

    Args:
        joined: to be filled, [B * segments, HV, K, V] float32.
        ends: end states from zero, which are columns of `segment_ends`; backward, the gradients of first states.
        segment_ends: [B * segments, HV, K, V + K] float32; its last K columns are the transitions.
        start: what comes ahead of the first step [B, HV, K, V] float32, or None for zeros.
        last: to be filled with the result after the last step [B, HV, K, V] float32, or None.
    """
    settings = segment_scan_launch(call.K)
    launch(
        segment_scan_kernel,
        (call.V // settings["BV"], call.B, call.HV),
        joined,
        ends,
        segment_ends[..., call.V :],
        start,
        last,
        call.segments,
        HV=call.HV,
        K=call.K,
        V=call.V,
        E_STRIDE=ends.stride(2),
        M_STRIDE=call.V + call.K,
        BACKWARD=backward,
        HAS_START=start is not None,
        SAVE_LAST=last is not None,
        **settings,
    )
