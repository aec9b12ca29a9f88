"""RMS norm over the hidden dimension: for layers that compute their own backward pass, and without gradients.

    r = rsqrt(mean(x^2) + eps)       n = r x       y = n weight

    dn = dy weight       dx = r (dn - n mean(dn n)) + dx of the residual stream       dweight = sum over rows of dy n

Both kernels are bound by memory: the forward pass reads x and writes y, the backward pass reads x, dy and the gradient
that passes the norm by, and writes dx and y again. Sums are in float32.

Symbols of the kernels: R rows of D elements, with BD >= D a power of 2. A program takes BR rows at a time.
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
from lrnn.kernels.reference import rms_norm as reference

MAX_SIZE = 8192
WARPS, TILE = 8, 4096  # elements at a time
ROWS = 16  # rows per program of the backward pass, each of which computes one part of dweight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * weight over the last dimension, computed in float32.

    One kernel computes it on a GPU if no gradient is needed, as in evaluation and generation. PyTorch computes it
    otherwise.

    Args:
        x: [..., D], any float dtype.
        weight: [D], any float dtype.
        eps: added to the mean of the squares.

    Returns:
        [..., D] in the dtype of x.
    """
    if runs_without_gradients(x, weight) and x.dtype in DTYPES and x.shape[-1] <= MAX_SIZE:
        return torch.ops.lrnn.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


@triton.jit(do_not_specialize=["R", "eps"])
def rms_norm_forward_kernel(x, weight, y, R, eps, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < R)[:, None] & (o_d < D)[None, :]
    p = (o_r * D)[:, None] + o_d[None, :]
    b_x = tl.load(x + p, mask=mask, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    tl.store(y + p, (b_x * b_r[:, None] * b_w[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "eps"])
def rms_norm_backward_kernel(
    x,
    weight,
    dy,
    dpast,
    dx,
    y,
    dweight_parts,
    R,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BR, BD], tl.float32)
    for i in range(0, ROWS, BR):
        o_r = tl.program_id(0).to(tl.int64) * ROWS + i + tl.arange(0, BR)
        mask = (o_r < R)[:, None] & (o_d < D)[None, :]
        p = (o_r * D)[:, None] + o_d[None, :]
        b_x = tl.load(x + p, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + p, mask=mask, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
        b_n = tl.where(mask, b_x * b_r[:, None], 0.0)  # past the end 0 * inf would be NaN if eps is 0
        b_dw += b_dy * b_n
        b_dn = b_dy * b_w[None, :]
        b_dx = b_r[:, None] * (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None])
        if dpast is not None:
            b_dx += tl.load(dpast + p, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + p, b_dx.to(dx.dtype.element_ty), mask=mask)
        tl.store(y + p, (b_n * b_w[None, :]).to(y.dtype.element_ty), mask=mask)
    tl.store(dweight_parts + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_dw, 0), mask=o_d < D)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * weight.

    Args:
        x: [..., D] contiguous, bfloat16, float16 or float32, D at most 8192.
        weight: [D], any of these dtypes.
        eps: added to the mean of the squares.

    Returns:
        [..., D] in the dtype of x.
    """
    y = torch.empty_like(x)
    sizes, rows = _sizes(x)
    _launch(rms_norm_forward_kernel, x, rows, x, weight, y, x.numel() // x.shape[-1], eps, **sizes, BR=rows)
    return y


@torch.library.custom_op("lrnn::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.cuda.device_of(x):  # does nothing for CPU tensors, in Triton's interpreter
        return rms_norm_forward(x.contiguous(), weight.contiguous(), eps)


@_rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, dpast: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and weight, and rms_norm(x) * weight again, which the next product's gradient needs.

    Args:
        dy: gradient of the norm, [..., D] contiguous.
        x, weight, eps: the arguments of `rms_norm_forward`.
        dpast: another gradient of x, which is added: that of the residual stream past the norm. [..., D] contiguous.

    Returns:
        dx in the dtype of x, dweight in float32, summed in a fixed order, and y as `rms_norm_forward` returns it.
    """
    dx, y = torch.empty_like(x), torch.empty_like(x)
    (sizes, rows), R, D = _sizes(x), x.numel() // x.shape[-1], x.shape[-1]
    parts = torch.empty((triton.cdiv(R, ROWS), D), dtype=torch.float32, device=x.device)
    arguments = (x, weight, dy, dpast, dx, y, parts, R, eps)
    _launch(rms_norm_backward_kernel, x, ROWS, *arguments, **sizes, BR=rows, ROWS=ROWS)
    return dx, parts.sum(0), y


def _sizes(x: Tensor) -> tuple[dict[str, int], int]:
    """Return the constants of a launch, and the rows that a program takes at a time: some TILE elements."""
    D = x.shape[-1]
    if not 0 < D <= MAX_SIZE:
        raise ValueError(f"the norm's kernels take up to {MAX_SIZE} elements per row; got x {[*x.shape]}")
    BD = triton.next_power_of_2(max(D, 16))
    return {"D": D, "BD": BD}, max(1, min(ROWS, TILE // BD))


def _launch(kernel, x: Tensor, rows: int, *arguments, **constants) -> None:
    R = x.numel() // x.shape[-1]
    if R:
        launch(kernel, (triton.cdiv(R, rows), 1, 1), *arguments, **constants, num_warps=WARPS, num_stages=1)


def compile_cases(D: int = 2048) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as training compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    types = {"weight": "*fp32", "dweight_parts": "*fp32", "R": "i32", "eps": "fp32"}
    constants = {"D": D, "BD": D, "BR": TILE // D}
    for name, kernel, own in (
        ("forward", rms_norm_forward_kernel, {}),
        ("backward", rms_norm_backward_kernel, {"ROWS": ROWS}),
    ):
        signature = {n: types.get(n, "*bf16") for n in kernel.arg_names if n not in {**constants, **own}}
        yield f"rms_norm_{name}_bf16", kernel, signature, {**constants, **own}, WARPS, 1
