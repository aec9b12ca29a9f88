"""Tiles of matrices for the TMA (the tensor memory accelerator of Hopper and later GPUs)."""

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


class GluonTiles(GluonTensorDescriptor):
    """Tiles as a kernel in Gluon is compiled for them, with their layout in shared memory.

    Rows are swizzled by 128 bytes, as the tensor cores read them; a single row is not. The compiled kernel takes the
    `Tiles` themselves.
    """

    def __init__(self, tiles: Tiles):
        self.base, self.shape, self.strides = tiles.base, tiles.shape, tiles.strides
        self.block_shape = tiles.block_shape
        self.layout = NVMMASharedLayout(128 if tiles.block_shape[0] >= 8 else 0, tiles.base.element_size() * 8, rank=2)
