"""Rotation of pairs of channels, by which attention encodes positions (arXiv 2104.09864).

    y[i] = x[i] cos - x[i + D/2] sin       y[i + D/2] = x[i + D/2] cos + x[i] sin

The gradient is the rotation back, so one kernel computes both directions. It is bound by memory: it reads x and writes
y. It computes in float32.

Symbols of the kernel: R tokens, each of H heads with 2 N channels. Token r has the angles of row r mod A. A program
takes BH >= H heads and BN >= N pairs of a token.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrnn.kernels.common.dispatch import use_kernels
from lrnn.kernels.common.dtypes import DTYPES
from lrnn.kernels.common.launch import launch
from lrnn.kernels.reference import rotary as reference

WARPS = 4


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with each pair of channels (i, i + D/2) rotated by its angle. It has no gradients of the angles.

    It is computed in float32 (in float64 for float64, which runs in PyTorch). On CUDA one Triton kernel computes each
    direction, and only the angles are kept for the backward pass.

    Args:
        x: [B, T, H, D], queries or keys.
        cos, sin: float32 [1 or B, T, 1, D/2], cosines and sines of the angles.

    Returns:
        A tensor of the shape and dtype of x.
    """
    if use_kernels(x) and x.dtype in DTYPES:
        return torch.ops.lrnn.rotate(x, cos, sin, False)
    return reference.rotate(x, cos, sin)


@triton.jit(do_not_specialize=["A"])
def rotate_kernel(
    x, cos, sin, y, A, H: tl.constexpr, N: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BACK: tl.constexpr
):
    i_r = tl.program_id(0).to(tl.int64)
    o_h, o_n = tl.arange(0, BH), tl.arange(0, BN)
    m_n = o_n < N
    b_cos = tl.load(cos + (i_r % A) * N + o_n, mask=m_n, other=0.0)[None, :]
    b_sin = tl.load(sin + (i_r % A) * N + o_n, mask=m_n, other=0.0)[None, :]
    if BACK:
        b_sin = -b_sin
    mask = (o_h < H)[:, None] & m_n[None, :]
    p = (i_r * H + o_h[:, None]) * (2 * N) + o_n[None, :]
    b_1 = tl.load(x + p, mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(x + p + N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + p, (b_1 * b_cos - b_2 * b_sin).to(y.dtype.element_ty), mask=mask)
    tl.store(y + p + N, (b_2 * b_cos + b_1 * b_sin).to(y.dtype.element_ty), mask=mask)


@torch.library.custom_op("lrnn::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    B, T, H, D = x.shape
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):  # does nothing for CPU tensors, in Triton's interpreter
        launch(
            rotate_kernel,
            (B * T, 1, 1),
            x,
            cos,
            sin,
            y,
            cos.numel() // (D // 2),
            H=H,
            N=D // 2,
            BH=triton.next_power_of_2(H),
            BN=max(triton.next_power_of_2(D // 2), 8),
            BACK=back,
            num_warps=WARPS,
            num_stages=1,
        )
    return y


@_rotate.register_fake
def _(x, cos, sin, back):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dy):
    return torch.ops.lrnn.rotate(dy, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_gradients, setup_context=_save)


def compile_cases(H: int = 16, D: int = 128) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernel as training compiles it, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "cos": "*fp32", "sin": "*fp32", "y": f"*{dtype}", "A": "i32"}
        constants = {"H": H, "N": D // 2, "BH": H, "BN": D // 2, "BACK": False}
        yield f"rotate_{dtype}", rotate_kernel, types, constants, WARPS, 1
