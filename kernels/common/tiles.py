"""Tiles of matrices for the TMA (the tensor memory accelerator of Hopper and later GPUs)."""

import math

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor


def with_rows(x: Tensor) -> Tensor:
    """Return x [B, T, H, D], or a copy if the TMA cannot read it as a matrix [B * T, H * D].

    The TMA needs rows of contiguous elements that start at multiples of 16 bytes.
    """
    B, T, H, D = x.shape
    by_sequence, by_token, by_head, by_element = x.stride()
    packed = by_element == 1 and (H == 1 or by_head == D) and (B == 1 or by_sequence == T * by_token)
    if not packed or by_token < H * D or by_token * x.element_size() % 16 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


class Tiles(TensorDescriptor):
    """Tiles [rows, columns] of a matrix, for loads and stores by the TMA.

    The matrix is a new one, or [B * T, H * D] of what `with_rows` returns. Triton's own constructor would check again
    whether the TMA can read it, which takes longer than everything else it does.
    """

    def __init__(self, x: Tensor, rows: int, columns: int):
        self.base = x
        self.shape: tuple[int, ...] = x.shape
        self.strides: tuple[int, ...] = x.stride()
        if x.ndim == 4:
            B, T, H, D = self.shape
            self.shape, self.strides = (B * T, H * D), (self.strides[1], 1)
        self.block_shape = [rows, columns]
        self.kind = (x.dtype, rows, columns)  # what a compiled kernel depends on


class SpacedTiles(Tiles):
    """Tiles [rows, columns] of a tensor [B, T, H, D] in which `factors` - 1 rows of zeros follow each of its rows.

    Neither are the zeros read, nor is what a kernel has in their place stored. For the TMA a tile is a block [rows /
    factors, factors, columns] whose second dimension has size 1 in memory: it fills what lies outside with zeros, and
    stores nothing there. A block to be stored must not begin outside, so the zeros come last.
    """

    def __init__(self, x: Tensor, rows: int, columns: int, factors: int):
        super().__init__(x, rows, columns)
        (count, width), (stride, _) = self.shape, self.strides
        self.shape, self.strides = (count, 1, width), (stride, stride, 1)
        self.block_shape = [rows // factors, factors, columns]
        self.kind: tuple = (*self.kind, factors)


class GluonTiles(GluonTensorDescriptor):
    """Tiles as a kernel in Gluon is compiled for them, with their layout in shared memory.

    Rows are swizzled by 128 bytes, as the tensor cores read them; a single row is not. The compiled kernel takes the
    `Tiles` themselves.
    """

    def __init__(self, tiles: Tiles):
        self.base, self.shape, self.strides = tiles.base, tiles.shape, tiles.strides
        self.block_shape = tiles.block_shape
        *rows, _ = tiles.block_shape
        swizzle, bits = 128 if math.prod(rows) >= 8 else 0, tiles.base.element_size() * 8
        self.layout = NVMMASharedLayout(swizzle, bits, rank=len(tiles.block_shape))
