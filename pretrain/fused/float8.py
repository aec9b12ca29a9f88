"""Products in float8 on tensor cores that have it (compute capability 8.9 and above).

The forward pass and the gradient of the input multiply float8_e4m3fn, with one scale per token and one per row or
column of the weights; the result is rounded to bfloat16. The gradient of the weights, which is summed over tokens,
stays a product in 16 bits: torchao names this recipe `rowwise_with_gw_hp`, the most exact of its three.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from lrnn.errors import UserError
from lrnn.kernels.float8 import MAX_SIZE, Float8Rows, cast_rows
from lrnn.pretrain.fused.product import Product


class Float8Product(Product):
    """y = x W^T as `Product` computes it, with x W^T and dy W in float8.

    The weights are cast from float32 once per step, by rows and by columns; these copies take as much memory as one in
    16 bits.

    Raises:
        UserError: a size is not a multiple of 16, or too long for a row.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype):
        super().__init__(weights, dtype)
        check_sizes(self.columns, sum(self.rows))
        self._copies: tuple[Float8Rows, Float8Rows] | None = None

    def refresh(self) -> None:
        """Cast the weights, by rows and by columns."""
        self._copies = self._by_rows(), self._by_columns()

    def forward(self, x: Tensor | Float8Rows) -> Tensor:
        """Return x W^T, [n, sum of rows_i] in `dtype`, for x [n, columns]."""
        return self._multiply(x, self._copies[0] if self._copies else self._by_rows())

    def input_gradient(self, dy: Tensor | Float8Rows) -> Tensor:
        """Return dy W, [n, columns] in `dtype`, for dy [n, sum of rows_i]."""
        return self._multiply(dy, self._copies[1] if self._copies else self._by_columns())

    def _by_rows(self) -> Float8Rows:
        return cast_rows(torch.cat([weight.detach() for weight in self.weights]))

    def _by_columns(self) -> Float8Rows:
        return cast_rows(torch.cat([weight.detach() for weight in self.weights]).T.contiguous())

    def _multiply(self, x: Tensor | Float8Rows, w: Float8Rows) -> Tensor:
        x = x if isinstance(x, Float8Rows) else cast_rows(x)
        scales = (x.scales, ScalingType.RowWise, w.scales.T, ScalingType.RowWise)
        # With fast accumulation, partial sums stay in the tensor cores instead of being added up in float32 registers.
        # On an H200, the error of a product over 2,048 or 5,632 numbers is 3.75% with and without it.
        return scaled_mm(x.values, w.values.T, *scales, output_dtype=self.dtype, use_fast_accum=True)


def check_sizes(columns: int, rows: int) -> None:
    """Raise UserError if products in float8 do not take a matrix of weights [rows, columns]."""
    if any(size % 16 or size > MAX_SIZE for size in (columns, rows)):
        raise UserError(
            f"precision is 'fp8', whose products take sizes that are multiples of 16, up to {MAX_SIZE}; the model "
            f"has one from {columns} to {rows} features. Set precision to bfloat16"
        )
