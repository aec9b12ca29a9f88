"""x + mlp(norm(x)) or x + norm(mlp(x)) with SwiGLU, with their own backward passes. `LrnnBlock` has the plain form."""

from typing import Any

import torch
from torch import Tensor

from lrnn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from lrnn.kernels.swiglu import swiglu_backward, swiglu_backward_float8, swiglu_forward, swiglu_forward_float8
from lrnn.model.layers import RMSNorm
from lrnn.model.modeling_lrnn import SwiGLU
from lrnn.pretrain.fused.float8 import Float8Product
from lrnn.pretrain.fused.product import Product


class FusedMlp:
    """Compute x + mlp(norm(x)) or, if it norms the output, x + norm(mlp(x)).

    The input and the gate and up projections are kept for the backward pass, and the output of the MLP if it is normed;
    the norm of the input and the activations are computed again. With `recompute`, the projections and the output are
    too: that takes one product more, or two, and the input alone is kept. With `float8`, the products are those of
    `Float8Product`.
    """

    def __init__(
        self, norm: RMSNorm, mlp: SwiGLU, dtype: torch.dtype, recompute: bool, float8: bool, norms_output: bool = False
    ):
        self.norm, self.recompute, self.norms_output = norm, recompute, norms_output
        make = Float8Product if float8 else Product
        self.inner = make([mlp.gate_proj.weight, mlp.up_proj.weight], dtype)
        self.down = make([mlp.down_proj.weight], dtype)
        self.products = [self.inner, self.down]

    def __call__(self, x: Tensor) -> Tensor:
        """Return x + mlp(norm(x)) or x + norm(mlp(x)), for x [B, T, hidden] in the dtype of the products."""
        function = _NormedOutput if self.norms_output else _NormedInput
        return function.apply(x.contiguous(), self, self.norm.weight, *self.inner.weights, *self.down.weights)

    def project(self, x: Tensor) -> Tensor:
        """Return the gate and up projections of norm(x), or of x, [n, 2 intermediate], for x [n, hidden]."""
        return self.inner.forward(x if self.norms_output else rms_norm_forward(x, self.norm.weight, self.norm.eps))

    def out(self, ab: Tensor) -> Tensor:
        """Return the down projection [n, hidden] for gate and up projections [n, 2 intermediate]."""
        if isinstance(self.down, Float8Product):
            return self.down.forward(swiglu_forward_float8(ab))
        return self.down.forward(swiglu_forward(ab))

    def gradients(self, dz: Tensor, ab: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ab and of what was projected, and the activations again, for dz [n, hidden]."""
        dh = self.down.input_gradient(dz)
        if isinstance(self.inner, Float8Product):
            dab, h, dab8 = swiglu_backward_float8(dh, ab)
            return dab, self.inner.input_gradient(dab8), h
        dab, h = swiglu_backward(dh, ab)
        return dab, self.inner.input_gradient(dab), h


class _NormedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FusedMlp, *parameters: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ab = mlp.project(rows)
        ctx.mlp = mlp
        ctx.save_for_backward(x, *([] if mlp.recompute else [ab]))
        return mlp.out(ab).add_(rows).view_as(x)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), mlp = ctx.saved_tensors, ctx.mlp
        rows, dz_rows = x.flatten(0, 1), dz.contiguous().flatten(0, 1)
        ab = mlp.project(rows) if mlp.recompute else kept[0]
        dab, dy, h = mlp.gradients(dz_rows, ab)
        d_down = mlp.down.weight_gradients(dz_rows, h)
        dx, d_norm, y = rms_norm_backward(dy, rows, mlp.norm.weight, mlp.norm.eps, dz_rows)
        d_inner = mlp.inner.weight_gradients(dab, y)
        return dx.view_as(x), None, d_norm.to(mlp.norm.weight.dtype), *d_inner, *d_down


class _NormedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FusedMlp, *parameters: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ab = mlp.project(rows)
        y = mlp.out(ab)
        ctx.mlp = mlp
        ctx.save_for_backward(x, *([] if mlp.recompute else [ab, y]))
        return rms_norm_forward(y, mlp.norm.weight, mlp.norm.eps).add_(rows).view_as(x)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        (x, *kept), mlp = ctx.saved_tensors, ctx.mlp
        rows, dz_rows = x.flatten(0, 1), dz.contiguous().flatten(0, 1)
        if mlp.recompute:
            ab = mlp.project(rows)
            y = mlp.out(ab)
        else:
            ab, y = kept
        dy, d_norm = rms_norm_backward(dz_rows, y, mlp.norm.weight, mlp.norm.eps)[:2]
        dab, dx, h = mlp.gradients(dy, ab)
        d_down = mlp.down.weight_gradients(dy, h)
        d_inner = mlp.inner.weight_gradients(dab, rows)
        return dx.add_(dz_rows).view_as(x), None, d_norm.to(mlp.norm.weight.dtype), *d_inner, *d_down
