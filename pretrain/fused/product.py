"""Products with the weights of one or several linear layers, as the fused layers compute them.

Three things are done once where linear layers under autocast do them again and again:

- The weights are cast once per step, not in every pass of every micro-batch.
- The rows of several weights form one matrix, so that an input is read once, and its gradient is summed in the product.
- A weight's gradient is a product in float32 that is added to the gradients of earlier micro-batches as it is computed.
  Under autocast it is rounded to 16 bits, widened and then added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Product:
    """y = x W^T, where the rows of W are those of the given weights, one below the other.

    Args:
        weights: matrices [rows_i, columns]. Their values are read when they are needed, so that they may be replaced,
            or partitioned by ZeRO-3 between the passes of their layer.
        dtype: what is multiplied.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype):
        self.weights = tuple(weights)
        self.rows = [weight.shape[0] for weight in weights]
        self.columns = weights[0].shape[1]
        self.dtype = dtype
        self._copy: Tensor | None = None

    def refresh(self) -> None:
        """Make or renew the copy of the weights in `dtype`. Without one, every pass makes its own."""
        if self._copy is None:
            self._copy = self.weights[0].new_empty(sum(self.rows), self.columns, dtype=self.dtype)
        torch._foreach_copy_(list(self._copy.split(self.rows)), [weight.detach() for weight in self.weights])

    def matrix(self) -> Tensor:
        """Return W [sum of rows_i, columns] in `dtype`."""
        if self._copy is not None:
            return self._copy
        return torch.cat([weight.detach().to(self.dtype) for weight in self.weights])

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, [n, sum of rows_i] in `dtype`, for x [n, columns]."""
        return x @ self.matrix().T

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Return dy W, [n, columns] in `dtype`, for dy [n, sum of rows_i]."""
        return dy @ self.matrix()

    def add_input_gradient(self, dx: Tensor, dy: Tensor) -> None:
        """Add dy W to dx [n, columns], for dy [n, sum of rows_i]."""
        dx.addmm_(dy, self.matrix())

    def weight_gradients(self, dy: Tensor, x: Tensor) -> list[Tensor]:
        """Return the gradient of each weight in float32, for autograd to set: the rows of dy^T x.

        Where the weights have gradients from such a call already, they are taken away from them, and what is returned
        is the sum.
        """
        total = self._take_gradients()
        if total is None:
            total = product_float32(dy.T, x)
        else:
            add_product_float32(total, dy.T, x)
        return list(total.split(self.rows))

    def _take_gradients(self) -> Tensor | None:
        """Return the weights' gradients as one matrix and set them to None, if they are rows of one matrix."""
        gradients = [weight.grad for weight in self.weights]
        first = gradients[0]
        if first is None or first.dtype != torch.float32 or not first.is_contiguous():
            return None
        offset = first.storage_offset()
        for gradient, rows in zip(gradients, self.rows, strict=True):
            if (
                gradient is None
                or gradient.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
                or gradient.storage_offset() != offset
                or gradient.shape != (rows, self.columns)
                or not gradient.is_contiguous()
            ):
                return None
            offset += rows * self.columns
        for weight in self.weights:
            weight.grad = None
        return first.as_strided((sum(self.rows), self.columns), (self.columns, 1))


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32. With operands in 16 bits, nothing is rounded to 16 bits."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product_float32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, a matrix in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
