"""Launches of the short convolution's kernels."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lrnn.kernels.common.launch import launch
from lrnn.kernels.short_conv.kernels import starts

WARPS = 2
LONG_BLOCK, SHORT_BLOCK = 128, 32  # tokens per program; `_documents` has bits for 128


@dataclass(frozen=True)
class Tile:
    """What a thread of a program loads at a time: `rows` tokens, and `bytes_per_row` bytes of channels of each.

    More of them keep more loads under way, and take registers.
    """

    rows: int
    bytes_per_row: int


FORWARD, BACKWARD, BACKWARD_PACKED = Tile(8, 16), Tile(8, 8), Tile(4, 16)
MANY_TOKENS = 8192  # from this many tokens on, long blocks fill the GPU


def block_tokens(tokens: int) -> int:
    """Return the number of tokens per program for a batch of so many."""
    return LONG_BLOCK if tokens >= MANY_TOKENS else SHORT_BLOCK


def block_channels(tile: Tile, element_size: int) -> int:
    """Return the number of channels per program."""
    return tile.bytes_per_row // element_size * 32 * WARPS


def launch_on(
    kernel: Any,
    tile: Tile,
    xs: list[Tensor],
    weights: list[Tensor],
    before: list[Tensor],
    cu_seqlens: Tensor | None,
    *own: Any,
    **constants: Any,
) -> None:
    """Launch a kernel of the short convolution.

    Args:
        kernel: `short_conv_forward_kernel` or `short_conv_backward_kernel`.
        tile: what a thread loads at a time.
        xs, weights, before, cu_seqlens: the arguments of `short_conv`, with `before` empty if there is none.
        own, constants: the arguments, and the constants, that this kernel alone has.
    """
    B, T, _ = xs[0].shape
    BT, BD = block_tokens(B * T), block_channels(tile, xs[0].element_size())
    D = tuple(x.shape[2] for x in xs)
    programs = B * triton.cdiv(T, BT) * starts(D, BD)[-1]
    if programs == 0:
        return
    x, S = _readable(xs)
    ahead, SB = _readable([b.to(xs[0].dtype) for b in before])
    with torch.cuda.device_of(xs[0]):  # does nothing for CPU tensors, in Triton's interpreter
        launch(
            kernel,
            (programs, 1, 1),
            x,
            tuple(w.contiguous() for w in weights),
            ahead or None,
            *own,
            cu_seqlens,
            T,
            triton.cdiv(T, BT),
            None if cu_seqlens is None else cu_seqlens.numel() - 1,
            D=D,
            S=S,
            SB=SB,
            **constants,
            W=weights[0].shape[-1],
            BT=BT,
            BR=tile.rows,
            BD=BD,
            HAS_BEFORE=bool(before),
            IS_VARLEN=cu_seqlens is not None,
            num_warps=WARPS,
            num_stages=1,
        )


def row_steps(xs: list[Tensor]) -> tuple[int, ...]:
    """Return the number of elements between the rows of each of xs, to be written in place.

    Raises:
        ValueError: rows are not evenly spaced.
    """
    rows = [_rows(x) for x in xs]
    if any(found is not x for (found, _), x in zip(rows, xs, strict=True)):
        raise ValueError(f"rows must be evenly spaced; got strides {[x.stride() for x in xs]}")
    return tuple(step for _, step in rows)


def _readable(xs: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return xs, copied where their rows are not evenly spaced, and the number of elements between the rows of each."""
    rows = [_rows(x) for x in xs]
    return tuple(x for x, _ in rows), tuple(step for _, step in rows)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    B, T, D = x.shape
    step = x.stride(0) if T == 1 else x.stride(1)
    even = B == 1 or T == 1 or x.stride(0) == T * step
    if even and (D == 1 or x.stride(2) == 1):
        return x, step
    return x.contiguous(), D
