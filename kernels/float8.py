"""Cast matrices to float8_e4m3fn with one scale per row, for products whose sums run along the rows.

    scale = max |row| / 448       y = x / scale

With rows x_i = scale_i y_i and w_j = scale_j v_j, the product is x_i w_j = scale_i scale_j (y_i v_j): the scales leave
the sum, and `torch.nn.functional.scaled_mm` applies them to its result. The scales follow from the values of the
moment, so that there is no history to save in checkpoints.

A number that is not finite becomes NaN, which reaches the product.

Symbols of the kernel: R rows of D elements, which start SX apart in x. A program takes BR rows, and BD >= D, a power
of 2.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch

MAX_SIZE = 32768
WARPS, TILE = 8, 4096  # elements at a time of short rows


class Float8Rows(NamedTuple):
    """A matrix in float8: values [R, D] float8_e4m3fn, and scales [R, 1] float32, with x = values * scales."""

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> "Float8Rows":
        """Return a matrix that is to be written."""
        values = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=device)
        return cls(values, torch.empty((rows, 1), dtype=torch.float32, device=device))


@triton.jit
def row_scale(largest):
    # Scale of a row from its largest absolute value.
    return tl.where(largest > 0.0, largest / 448.0, 1.0)


@triton.jit(do_not_specialize=["R"])
def cast_rows_kernel(x, y, scales, R, SX, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < R)[:, None] & (o_d < D)[None, :]
    b_x = tl.load(x + (o_r * SX)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_scale = row_scale(tl.max(tl.abs(b_x), 1))
    tl.store(y + (o_r * D)[:, None] + o_d[None, :], (b_x / b_scale[:, None]).to(tl.float8e4nv), mask=mask)
    tl.store(scales + o_r, b_scale, mask=o_r < R)


def cast_rows(x: Tensor) -> Float8Rows:
    """Cast a matrix to float8 by rows.

    Args:
        x: [R, D] bfloat16, float16 or float32, whose rows are contiguous; D at most 32768.

    Raises:
        ValueError: rows are too long, or not contiguous.
    """
    R, D = x.shape
    if not 0 < D <= MAX_SIZE or x.stride(-1) != 1:
        raise ValueError(
            f"rows of up to {MAX_SIZE} contiguous elements can be cast; got [{R}, {D}] with strides {x.stride()}"
        )
    result = Float8Rows.empty(R, D, x.device)
    if R:
        BD = triton.next_power_of_2(max(D, 16))
        BR, warps = max(1, TILE // BD), 16 if BD > 8192 else WARPS
        constants = {"D": D, "BD": BD, "BR": BR, "num_warps": warps}
        launch(cast_rows_kernel, (triton.cdiv(R, BR), 1, 1), x, *result, R, x.stride(0), **constants)
    return result


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernel as training compiles it, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    types = {"x": "*bf16", "y": "*fp8e4nv", "scales": "*fp32", "R": "i32", "SX": "i32"}
    yield "cast_rows_bf16", cast_rows_kernel, types, {"D": 2048, "BD": 2048, "BR": TILE // 2048}, WARPS, 3
