"""Where the parameters are in the flat slices that a ZeRO optimizer of DeepSpeed keeps on each rank."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn


class Piece(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter, which begin at `offset` in a flat slice."""

    parameter: nn.Parameter
    start: int
    numel: int
    offset: int


class Slice(NamedTuple):
    """A flat float32 tensor on this rank, which the optimizer updates.

    Attributes:
        group: number of the parameter group.
        flat: the tensor.
        pieces: what it consists of.
    """

    group: int
    flat: Tensor
    pieces: list[Piece]


def slices(zero: Any, stage: int) -> Iterator[Slice]:
    """Yield the slices of this rank, in the same order on all ranks.

    Args:
        zero: the ZeRO optimizer.
        stage: its stage, 1, 2 or 3.
    """
    return _stage3(zero) if stage == 3 else _stage12(zero)


def _stage12(zero: Any) -> Iterator[Slice]:
    """Yield a slice per parameter group, whose parameters are laid end to end and cut into equal parts."""
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        low = dist.get_rank(zero.real_dp_process_group[i]) * zero.partition_size[i]
        high = low + zero.partition_size[i]
        pieces = []
        for parameter, offset in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            start, end = max(low, offset), min(high, offset + parameter.numel())
            if start < end:
                pieces.append(Piece(parameter, start - offset, end - start, start - low))
        yield Slice(i, flat, pieces)


def _stage3(zero: Any) -> Iterator[Slice]:
    """Yield the slices of stage 3, where each parameter is cut into equal parts, the last one padded."""
    rank = dist.get_rank(zero.dp_process_group)
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        pieces, offset = [], 0
        for parameter in zero.fp16_groups[i]:
            part = parameter.ds_tensor.ds_numel
            start, end = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < end:
                pieces.append(Piece(parameter, start, end - start, offset))
            offset += part
        yield Slice(zero.sub_group_to_group_id[i], flat, pieces)
