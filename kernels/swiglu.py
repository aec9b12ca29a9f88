"""SwiGLU, silu(gate) * up, of the two halves of one product, for layers that compute their own backward pass.

    h = silu(a) b       da = dh b silu'(a)       db = dh silu(a)       silu'(a) = s (1 + a (1 - s)), s = sigmoid(a)

Both kernels are bound by memory. The backward pass also returns h, so that only the product has to be kept.

Symbols of the kernels: R rows of 2 D elements, a ahead of b. A program takes BD elements of one row of a and of b.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.launch import launch

WARPS = 8
BLOCK = 2048  # elements of a row per program


@triton.jit
def _halves(ab, D: tl.constexpr, BD: tl.constexpr):
    # Positions in a row of h, their mask, and float32 a and b.
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_a = tl.load(ab + i_r * (2 * D) + o_d, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(ab + i_r * (2 * D) + D + o_d, mask=mask, other=0.0).to(tl.float32)
    return i_r, o_d, mask, b_a, b_b


@triton.jit
def swiglu_forward_kernel(ab, h, D: tl.constexpr, BD: tl.constexpr):
    i_r, o_d, mask, b_a, b_b = _halves(ab, D, BD)
    tl.store(h + i_r * D + o_d, (b_a * tl.sigmoid(b_a) * b_b).to(h.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(ab, dh, dab, h, D: tl.constexpr, BD: tl.constexpr):
    i_r, o_d, mask, b_a, b_b = _halves(ab, D, BD)
    b_dh = tl.load(dh + i_r * D + o_d, mask=mask, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_a)
    tl.store(h + i_r * D + o_d, (b_a * b_s * b_b).to(h.dtype.element_ty), mask=mask)
    b_da = b_dh * b_b * b_s * (1.0 + b_a * (1.0 - b_s))
    tl.store(dab + i_r * (2 * D) + o_d, b_da.to(dab.dtype.element_ty), mask=mask)
    tl.store(dab + i_r * (2 * D) + D + o_d, (b_dh * b_a * b_s).to(dab.dtype.element_ty), mask=mask)


def swiglu_forward(ab: Tensor) -> Tensor:
    """Return silu(a) * b, [R, D] in the dtype of ab, for ab [R, 2 D] contiguous: a in the first D columns, then b.

    It is computed in float32 and rounded once.
    """
    R, D = ab.shape[0], ab.shape[1] // 2
    h = ab.new_empty(R, D)
    _launch(swiglu_forward_kernel, R, D, ab, h)
    return h


def swiglu_backward(dh: Tensor, ab: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ab [R, 2 D], and silu(a) * b [R, D] again, for dh [R, D] and ab [R, 2 D] contiguous."""
    R, D = dh.shape
    dab, h = torch.empty_like(ab), torch.empty_like(dh)
    _launch(swiglu_backward_kernel, R, D, ab, dh, dab, h)
    return dab, h


def _launch(kernel, R: int, D: int, *arguments: Tensor) -> None:
    if R:
        BD = min(BLOCK, triton.next_power_of_2(D))
        launch(kernel, (R, triton.cdiv(D, BD), 1), *arguments, D=D, BD=BD, num_warps=WARPS, num_stages=1)


def compile_cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as training compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    constants = {"D": 5632, "BD": BLOCK}
    for name, kernel in (("forward", swiglu_forward_kernel), ("backward", swiglu_backward_kernel)):
        signature = {n: "*bf16" for n in kernel.arg_names if n not in constants}
        yield f"swiglu_{name}_bf16", kernel, signature, constants, WARPS, 1
