"""Cast matrices to float8_e4m3fn with one scale per row, for products whose sums run along the rows.

    scale = max |row| / 448       y = x / scale

With rows x_i = scale_i y_i and w_j = scale_j v_j, the product is x_i w_j = scale_i scale_j (y_i v_j): the scales leave the
sum, and `torch.nn.functional.scaled_mm` applies them to its result. The scales follow from the values of the moment, so
that there is no history to save in checkpoints.

A number that is not finite makes the numbers of its row NaN where it stands, so that it is seen in the product.

Symbols of the kernel: R rows of D elements, which start SX apart in x. A program takes BR rows, with BD >= D a power of 2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch

LARGEST = 448.0  # of float8_e4m3fn
MAX_SIZE = 32768
WARPS, TILE = 8, 4096  # elements at a time of short rows


@triton.jit
def scaled_float8(x, mask):
    """Return the rows of a tile x [BR, BD] in float8_e4m3fn, and their scales [BR]."""
    largest = tl.max(tl.where(mask, tl.abs(x), 0.0), 1)
    scale = tl.where(largest > 0.0, largest / 448.0, 1.0)
    return (x / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["R"])
def cast_rows_kernel(x, y, scales, R, SX, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < R)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + (o_r * SX)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_y, b_scale = scaled_float8(b_x, mask)
    tl.store(y + (o_r * D)[:, None] + o_d[None, :], b_y, mask=mask)
    tl.store(scales + o_r, b_scale, mask=o_r < R)


def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cast a matrix to float8 by rows.

    Args:
        x: [R, D] bfloat16, float16 or float32, whose rows are contiguous; D at most 32768.

    Returns:
        y [R, D] float8_e4m3fn, contiguous, and the scales [R, 1] float32, with x = y * scales up to rounding.
    """
    R, D = x.shape
    if not 0 < D <= MAX_SIZE or x.stride(-1) != 1:
        raise ValueError(f"rows of up to {MAX_SIZE} contiguous elements can be cast; got [{R}, {D}], strides {x.stride()}")
    y = torch.empty((R, D), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((R, 1), dtype=torch.float32, device=x.device)
    if R:
        BD = triton.next_power_of_2(max(D, 16))
        BR, warps = max(1, TILE // BD), 16 if BD > 8192 else WARPS
        constants = {"D": D, "BD": BD, "BR": BR}
        launch(cast_rows_kernel, (triton.cdiv(R, BR), 1, 1), x, y, scales, R, x.stride(0), **constants, num_warps=warps)
    return y, scales
