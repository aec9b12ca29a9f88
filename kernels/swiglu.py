"""SwiGLU, silu(gate) * up: for layers that compute their own backward pass, and without gradients.

    h = silu(a) b       da = dh b silu'(a)       db = dh silu(a)       silu'(a) = s (1 + a (1 - s)), s = sigmoid(a)

Both kernels are bound by memory. The layers have a and b as the two halves of one product. The backward pass also
returns h, so that only the product has to be kept. Where the next product is in float8, they write its operand: h in
the forward pass, and the gradient of ab in the backward pass.

Symbols of the kernels: R rows of D elements of a and of b, which start S elements apart. A program takes BD elements of
one row of each, or the whole row where it computes the row's scale in float8.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.dispatch import runs_without_gradients
from lrnn.kernels.common.dtypes import DTYPES
from lrnn.kernels.common.launch import launch
from lrnn.kernels.float8 import Float8Rows, row_scale
from lrnn.kernels.reference import swiglu as reference

BLOCK = 2048  # elements of a row per program
MAX_FLOAT8_SIZE = 16384  # of D


@triton.jit
def _load(a, b, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    # Positions in a row of h, their mask, and float32 a and b.
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_a = tl.load(a + i_r * S + o_d, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(b + i_r * S + o_d, mask=mask, other=0.0).to(tl.float32)
    return i_r, o_d, mask, b_a, b_b


@triton.jit
def swiglu_forward_kernel(a, b, h, scales, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    i_r, o_d, mask, b_a, b_b = _load(a, b, S, D, BD)
    b_h = b_a * tl.sigmoid(b_a) * b_b
    if scales is not None:
        b_scale = row_scale(tl.max(tl.abs(b_h), 0))
        tl.store(scales + i_r, b_scale)
        b_h /= b_scale
    tl.store(h + i_r * D + o_d, b_h.to(h.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(ab, dh, dab, h, dab8, scales, D: tl.constexpr, BD: tl.constexpr):
    i_r, o_d, mask, b_a, b_b = _load(ab, ab + D, 2 * D, D, BD)
    b_dh = tl.load(dh + i_r * D + o_d, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_a)
    tl.store(h + i_r * D + o_d, (b_a * b_s * b_b).to(h.dtype.element_ty), mask=mask)
    b_da = b_dh * b_b * b_s * (1.0 + b_a * (1.0 - b_s))
    b_db = b_dh * b_a * b_s
    p = i_r * (2 * D) + o_d
    tl.store(dab + p, b_da.to(dab.dtype.element_ty), mask=mask)
    tl.store(dab + p + D, b_db.to(dab.dtype.element_ty), mask=mask)
    if scales is not None:
        b_scale = row_scale(tl.max(tl.maximum(tl.abs(b_da), tl.abs(b_db)), 0))
        tl.store(scales + i_r, b_scale)
        tl.store(dab8 + p, (b_da / b_scale).to(tl.float8e4nv), mask=mask)
        tl.store(dab8 + p + D, (b_db / b_scale).to(tl.float8e4nv), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors [..., D] of one shape and dtype.

    One kernel computes it on a GPU if no gradient is needed, as in evaluation and generation: in float32, rounded once.
    PyTorch computes it otherwise.
    """
    if runs_without_gradients(gate, up) and gate.dtype in DTYPES:
        return torch.ops.lrnn.swiglu(gate, up)
    return reference.swiglu(gate, up)


@torch.library.custom_op("lrnn::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    D = gate.shape[-1]
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(h):  # does nothing for CPU tensors, in Triton's interpreter
        _launch(swiglu_forward_kernel, h.numel() // D, D, gate.contiguous(), up.contiguous(), h, None, S=D)
    return h


@_swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def swiglu_forward(ab: Tensor) -> Tensor:
    """Return silu(a) * b, [R, D] in the dtype of ab, for ab [R, 2 D] contiguous: a in the first D columns, then b.

    It is computed in float32 and rounded once.
    """
    R, D = ab.shape[0], ab.shape[1] // 2
    h = ab.new_empty(R, D)
    _launch(swiglu_forward_kernel, R, D, ab, ab[:, D:], h, None, S=2 * D)
    return h


def swiglu_forward_float8(ab: Tensor) -> Float8Rows:
    """Return what `swiglu_forward` does, [R, D] in float8, for D up to 16384."""
    R, D = ab.shape[0], ab.shape[1] // 2
    h = Float8Rows.empty(R, D, ab.device)
    _launch(swiglu_forward_kernel, R, D, ab, ab[:, D:], *h, S=2 * D)
    return h


def swiglu_backward(dh: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ab [R, 2 D], and silu(a) * b [R, D] again, for dh [R, D] and ab [R, 2 D] contiguous."""
    R, D = dh.shape
    dab, h = torch.empty_like(ab), torch.empty_like(dh)
    _launch(swiglu_backward_kernel, R, D, ab, dh, dab, h, None, None)
    return dab, h


def swiglu_backward_float8(dh: Tensor, ab: Tensor) -> tuple[Tensor, Tensor, Float8Rows]:
    """Return what `swiglu_backward` does, and the gradient of ab in float8 too, for D up to 16384."""
    R, D = dh.shape
    dab, h, dab8 = torch.empty_like(ab), torch.empty_like(dh), Float8Rows.empty(R, 2 * D, ab.device)
    _launch(swiglu_backward_kernel, R, D, ab, dh, dab, h, *dab8)
    return dab, h, dab8


def _launch(kernel, R: int, D: int, *arguments: Tensor | None, **constants: int) -> None:
    """Launch one of the kernels, whose last argument is given where it writes float8."""
    whole = arguments[-1] is not None
    if whole and D > MAX_FLOAT8_SIZE:
        raise ValueError(f"SwiGLU in float8 takes up to {MAX_FLOAT8_SIZE} elements per row; got {D}")
    if R:
        BD = triton.next_power_of_2(D)
        BD, warps = (BD, _float8_warps(BD)) if whole else (min(BLOCK, BD), 8)
        launch(kernel, (R, triton.cdiv(D, BD), 1), *arguments, **constants, D=D, BD=BD, num_warps=warps, num_stages=1)


def _float8_warps(BD: int) -> int:
    return 16 if BD > 4096 else 8


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as training compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    for dtype, BD, warps in (("bf16", BLOCK, 8), ("fp8", 8192, _float8_warps(8192))):
        for name, kernel in (("forward", swiglu_forward_kernel), ("backward", swiglu_backward_kernel)):
            constants: dict[str, Any] = {"D": 5632, "BD": BD}
            types = {"scales": "*fp32", "dab8": "*fp8e4nv"}
            if dtype == "bf16":
                constants |= {n: None for n in types if n in kernel.arg_names}
            elif name == "forward":
                types["h"] = "*fp8e4nv"
            constants |= {"S": 2 * 5632} if name == "forward" else {}
            signature = {n: types.get(n, "*bf16") for n in kernel.arg_names if n not in constants}
            yield f"swiglu_{name}_{dtype}", kernel, signature, constants, warps, 1
