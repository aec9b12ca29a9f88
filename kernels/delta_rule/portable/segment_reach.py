"""Find which chunks of a segment reach its ends: those that still have an effect there.

Unit keys and step sizes in [0, 2] make every factor I - beta k k^T of a transition a contraction. What a chunk leaves
is then no larger at its segment's end than the gates in between allow, and neither is the transition itself. Where
these gates leave less than 2^-160, an entry below 2^11 ends below float32's smallest number, as it would in the
recurrence. Such chunks are left out of the scans that look for a segment's transition and end state and, seen from the
segment's start, of the backward scan. With the gates of a model they are most of the chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule.call import Call, Operands

LEAST = -160.0  # log2 of a decay below which nothing is left

SEGMENT_REACH = {"BN": 64, "num_warps": 1}


@triton.jit(do_not_specialize=["segments", "chunks", "R", "least"])
def segment_reach_kernel(
    reach,
    vectors,
    segments,
    chunks,
    R,
    least,
    HV: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    HAS_START: tl.constexpr,
    SAVE_LAST: tl.constexpr,
):
    # reach [N, HV, 3] int32 holds for each segment and head: the first chunk that its end state depends on; the first
    # one that its transition depends on, which is 0 or, if nothing of it is left, `chunks`; and how many chunks the
    # gradient of the state ahead of it depends on. What `segment_scan` does not use depends on none. `least` is LEAST,
    # or -inf for no limit.
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    p_g = vectors + 4 * i_h.to(tl.int64) * R + i_n * chunks * BT + BT - 1  # each chunk's accumulated log-gates
    o_c = tl.arange(0, BN)
    is_first = i_n % segments == 0
    is_last = i_n % segments == segments - 1

    # A comparison with not-a-number is false, so such gates hide nothing.
    first, after = chunks, tl.zeros([], tl.float32)
    for i in range(tl.cdiv(chunks, BN)):
        place = chunks - 1 - (i * BN + o_c)  # from the last one backward
        g = tl.load(p_g + place * BT, mask=place >= 0, other=0.0)
        later = after + tl.cumsum(g, 0) - g
        first = tl.minimum(first, tl.min(tl.where((place < 0) | (later < least), chunks, place), 0))
        after += tl.sum(g, 0)
    count, before = 0, tl.zeros([], tl.float32)
    for i in range(tl.cdiv(chunks, BN)):
        place = i * BN + o_c
        g = tl.load(p_g + place * BT, mask=place < chunks, other=0.0)
        earlier = before + tl.cumsum(g, 0) - g
        count = tl.maximum(count, tl.max(tl.where((place >= chunks) | (earlier < least), 0, place + 1), 0))
        before += tl.sum(g, 0)

    # No segment follows the last one, and none comes ahead of the first one.
    is_lost = after < least
    if not HAS_START:
        is_lost |= is_first
        count = tl.where(is_first, 0, count)
    if not SAVE_LAST:
        is_lost |= is_last
    p_reach = reach + 3 * (i_n * HV + i_h)
    tl.store(p_reach, tl.where(is_last, chunks, first))
    tl.store(p_reach + 1, tl.where(is_lost, chunks, 0))
    tl.store(p_reach + 2, count)


def find_reach(call: Call, operands: Operands, *, has_start: bool, save_last: bool) -> Tensor:
    """Return the result of the kernel, int32 [B * segments, HV, 3].

    Chunks are skipped for their decay only if every factor contracts.

    Args:
        has_start: whether there is a state before the first segment.
        save_last: whether the state after the last segment is wanted.
    """
    reach = call.empty(call.chunks.sequences, call.HV, 3, dtype=torch.int32)
    launch(
        segment_reach_kernel,
        (call.chunks.sequences, call.HV, 1),
        reach,
        operands.vectors,
        call.segments,
        call.chunks.seq_len // CHUNK,
        call.R,
        LEAST if call.contracts else float("-inf"),
        HV=call.HV,
        BT=CHUNK,
        HAS_START=has_start,
        SAVE_LAST=save_last,
        **SEGMENT_REACH,
    )
    return reach
