"""Scan few long sequences in segments side by side, and join the segments.

Few long sequences do not fill the GPU with one scan each, so they are cut into segments. The transition (a matrix
[K, K]) of each segment, and its end state from a zero state, are computed side by side. Joining these gives the states
in which the segments start, and the scans start from there. The backward pass does the same with gradients, from the
ends. This is exact: it omits only numbers that float32 could not represent (`find_reach`).
"""

from torch import Tensor

from lrnn.kernels.delta_rule.backends import Backend
from lrnn.kernels.delta_rule.call import Call, Operands
from lrnn.kernels.delta_rule.portable.segment_reach import find_reach
from lrnn.kernels.delta_rule.portable.segment_scan import join_segments


def find_starts(
    backend: Backend,
    call: Call,
    operands: Operands,
    initial: Tensor | None,
    starts: Tensor,
    segment_ends: Tensor,
    save_last: bool,
) -> None:
    """Find the states in which segments start.

    Args:
        initial: initial states of the sequences [B, HV, K, V] float32, or None for zeros.
        starts: to be filled, states [B * segments, HV, K, V] float32.
        segment_ends: to be filled, end states from zero and transitions [B * segments, HV, K, V + K] float32.
        save_last: whether the final state after the last segment is wanted.
    """
    reach = find_reach(call, operands, has_start=initial is not None, save_last=save_last)
    backend.forward_scan(call, operands, None, segment_ends, reach=reach)
    join_segments(call, starts, segment_ends, segment_ends, initial, None, backward=False)


def find_end_gradients(
    backend: Backend,
    call: Call,
    operands: Operands,
    do: Tensor,
    dlast: Tensor | None,
    dinitial: Tensor | None,
    segment_ends: Tensor,
) -> Tensor:
    """Return the gradients of the states in which segments end, [B * segments, HV, K, V] float32.

    Args:
        do: gradient of the output, as for `Backend.backward_scan`.
        dlast: gradients of the final states [B, HV, K, V] float32, or None for zeros.
        dinitial: to be filled, gradients of the initial states [B, HV, K, V] float32, or None.
        segment_ends: as `find_starts` fills it.
    """
    dstarts, dends = (call.empty(call.chunks.sequences, call.HV, call.K, call.V) for _ in range(2))
    reach = find_reach(call, operands, has_start=dinitial is not None, save_last=dlast is not None)
    backend.backward_scan(call, operands, do, None, dstarts, reach=reach)
    join_segments(call, dends, dstarts, segment_ends, dlast, dinitial, backward=True)
    return dends
