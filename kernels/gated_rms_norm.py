"""RMS norm over the last dimension times a SiLU gate, forward and backward.

    r = rsqrt(mean(x^2) + eps)       n = r x       y = n weight silu(gate)

    dn = dy weight silu(gate)        dx = r (dn - n mean(dn n))
    dgate = dy n weight silu'(gate)  dweight = sum over rows of dy n silu(gate)

Both kernels are bound by memory. The forward pass goes once over x, gate and y. The backward pass goes once over x,
gate, dy, dx and dgate, and computes r again.

Symbols of the kernels: R rows of D elements lie in pieces of H contiguous rows, which start SX elements apart in x, SG
in gate and SDG in dgate. A tile has BR rows and BD >= D columns.
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
from lrnn.kernels.reference import gated_rms_norm as reference

MAX_SIZE = 256
WARPS = 4
FORWARD_TILE, BACKWARD_TILE = 4096, 2048  # elements per tile: 32 or 16 per thread
ROWS = 256  # rows per program of the backward pass, each of which computes one part of dweight


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * weight * silu(gate) over the last dimension.

    It is computed in float32 (in float64 for float64, on CPU). On CUDA, one Triton kernel computes the output and
    another one all gradients. Only the inputs are kept for the backward pass. The gradient of the weight is summed in a
    fixed order.

    Tensors x and gate are read in place if they are contiguous, or if they are [..., H, D] with contiguous heads at
    even distances, as in a slice of a projection's channels. Other strides are copied.

    Args:
        x: [..., D], bfloat16, float16 or float32 (float64 on CPU). On CUDA, D is at most 256, the size of a head.
        gate: [..., D], of one of the same dtypes, or None for the plain norm.
        weight: [D], of one of the same dtypes.
        eps: added to the mean square.

    Returns:
        A contiguous tensor of the shape of x, in the dtype of gate, or in that of x if there is no gate.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit or are not supported.
    """
    _check(x, gate, weight)
    if use_kernels(x):
        return torch.ops.lrnn.gated_rms_norm_forward(x, gate, weight, eps)
    return reference.gated_rms_norm(x, gate, weight, eps)


def _check(x: Tensor, gate: Tensor | None, weight: Tensor) -> None:
    on_gpu = use_kernels(x)
    D = x.shape[-1] if x.ndim else 0
    if D == 0 or (on_gpu and D > MAX_SIZE):
        raise ValueError(f"x must be [..., D] with D from 1 to {MAX_SIZE} on {x.device.type}; got {[*x.shape]}")
    if weight.shape != (D,) or (gate is not None and gate.shape != x.shape):
        gate_shape = None if gate is None else [*gate.shape]
        raise ValueError(
            f"gate must have the shape of x and weight be [D]; got x {[*x.shape]}, gate {gate_shape}, "
            f"weight {[*weight.shape]}"
        )
    dtypes = DTYPES if on_gpu else (*DTYPES, torch.float64)
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight)):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must have one of the dtypes {dtypes} on {x.device.type}; got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(
                f"x, gate and weight must be on one device; got {name} on {tensor.device}, x on {x.device}"
            )


@triton.jit
def _load(x, o_r, o_d, mask, S, H: tl.constexpr, D: tl.constexpr):
    # Rows o_r in float32 [BR, BD] of a tensor with pieces of H contiguous rows that start S elements apart.
    return tl.load(x + ((o_r // H) * S + (o_r % H) * D)[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "eps"])
def gated_rms_norm_forward_kernel(
    x,
    gate,
    weight,
    y,
    R,
    eps,
    SX: tl.constexpr,
    SG: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < R)[:, None] & (o_d < D)[None, :]
    b_x = _load(x, o_r, o_d, mask, SX, H, D)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    # y = r x weight silu(gate)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    b_y = b_x * b_r[:, None] * b_w[None, :]
    if HAS_GATE:
        b_g = _load(gate, o_r, o_d, mask, SG, H, D)
        b_y *= b_g * tl.sigmoid(b_g)
    tl.store(y + (o_r * D)[:, None] + o_d[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "eps"])
def gated_rms_norm_backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    y,
    dweight_parts,
    R,
    eps,
    SX: tl.constexpr,
    SG: tl.constexpr,
    SDG: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    o_d = tl.arange(0, BD)
    b_w = tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BR, BD], tl.float32)  # every thread has its own sums, which are added up at the end
    for i in range(0, ROWS, BR):
        o_r = tl.program_id(0).to(tl.int64) * ROWS + i + tl.arange(0, BR)
        mask = (o_r < R)[:, None] & (o_d < D)[None, :]
        p_out = (o_r * D)[:, None] + o_d[None, :]
        b_x = _load(x, o_r, o_d, mask, SX, H, D)
        b_dy = tl.load(dy + p_out, mask=mask, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
        b_n = tl.where(mask, b_x * b_r[:, None], 0.0)  # past the end 0 * inf would be NaN if eps is 0
        if HAS_GATE:
            # dgate = dy n weight silu'(gate), silu' = sigmoid (1 + gate (1 - sigmoid))
            b_g = _load(gate, o_r, o_d, mask, SG, H, D)
            b_s = tl.sigmoid(b_g)
            b_dg = b_dy * b_n * b_w[None, :] * b_s * (1.0 + b_g * (1.0 - b_s))
            if y is not None:
                tl.store(y + p_out, (b_n * b_w[None, :] * (b_g * b_s)).to(y.dtype.element_ty), mask=mask)
            p_dg = ((o_r // H) * SDG + (o_r % H) * D)[:, None] + o_d[None, :]
            tl.store(dgate + p_dg, b_dg.to(dgate.dtype.element_ty), mask=mask)
            b_dy *= b_g * b_s
        elif y is not None:
            tl.store(y + p_out, (b_n * b_w[None, :]).to(y.dtype.element_ty), mask=mask)
        # dweight = sum of dy silu(gate) n
        b_dw += b_dy * b_n
        # dx = r (dn - n mean(dn n)), dn = dy silu(gate) weight
        b_dn = b_dy * b_w[None, :]
        b_dx = b_r[:, None] * (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None])
        tl.store(dx + p_out, b_dx.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight_parts + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_dw, 0), mask=o_d < D)


def _pieces(x: Tensor) -> tuple[int, int] | None:
    """Return (H, step) if the rows of x lie in pieces of H contiguous rows, `step` elements apart, else None."""
    if x.is_contiguous():
        return 1, x.shape[-1]
    if x.ndim < 3 or x.stride(-1) != 1 or x.stride(-2) != x.shape[-1]:
        return None
    step, count = 0, 1  # the distance and number of the pieces in the dimensions seen so far, from the last one on
    for size, stride in zip(reversed(x.shape[:-2]), reversed(x.stride()[:-2]), strict=True):
        if size == 1:
            continue
        if count > 1 and stride != step * count:
            return None
        step, count = step if count > 1 else stride, count * size
    return x.shape[-2], step


def _readable(x: Tensor) -> tuple[Tensor, int, int]:
    """Return x, or a copy if it cannot be read in place, and its pieces (H, step)."""
    pieces = _pieces(x)
    return (x, *pieces) if pieces else (x.contiguous(), 1, x.shape[-1])


def _launch(
    kernel: Any,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    tile: int,
    rows: int | None,
    own: tuple,
    dgate: Tensor | None = None,
    **constants: int,
) -> None:
    """Launch a kernel.

    Args:
        kernel: `gated_rms_norm_forward_kernel` or `gated_rms_norm_backward_kernel`.
        x, gate, weight, eps: the arguments of `gated_rms_norm`.
        tile: elements per tile.
        rows: rows per program; None for those of one tile.
        own: the arguments that this kernel alone has.
        dgate: the one of them that may have strides.
        constants: the constants that this kernel alone has.
    """
    D = x.shape[-1]
    R = x.numel() // D
    if R == 0:
        return
    x, HX, SX = _readable(x)
    HG, SG, HDG, SDG = 1, D, 1, D
    if gate is not None:
        gate, HG, SG = _readable(gate)
    if dgate is not None:
        pieces = _pieces(dgate)
        assert pieces is not None, f"dgate cannot be written in place; its strides are {dgate.stride()}"
        HDG, SDG = pieces
    H = max(HX, HG, HDG)  # those that differ are 1: of a contiguous tensor, any number of rows makes a piece
    strides = {"SX": SX * (H // HX), "SG": SG * (H // HG)}
    if kernel is gated_rms_norm_backward_kernel:
        strides["SDG"] = SDG * (H // HDG)
    BD = triton.next_power_of_2(max(D, 16))
    BR = tile // BD
    with torch.cuda.device_of(x):  # does nothing for CPU tensors, in Triton's interpreter
        launch(
            kernel,
            (triton.cdiv(R, rows or BR), 1, 1),
            x,
            gate,
            weight.contiguous(),
            *own,
            R,
            eps,
            **strides,
            H=H,
            D=D,
            BR=BR,
            BD=BD,
            **constants,
            HAS_GATE=gate is not None,
            num_warps=WARPS,
            num_stages=1,
        )


def compute(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Do what `gated_rms_norm` does on a GPU, without autograd and checks."""
    y = torch.empty(x.shape, dtype=x.dtype if gate is None else gate.dtype, device=x.device)
    _launch(gated_rms_norm_forward_kernel, x, gate, weight, eps, FORWARD_TILE, None, (y,))
    return y


@torch.library.custom_op("lrnn::gated_rms_norm_forward", mutates_args=())
def _forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    return compute(x, gate, weight, eps)


@_forward.register_fake
def _(x, gate, weight, eps):
    return x.new_empty(x.shape, dtype=x.dtype if gate is None else gate.dtype)


@torch.library.custom_op("lrnn::gated_rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """Return dx, dgate if there is a gate, and dweight in float32."""
    dgate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    dx, dweight = write_gradients(dgate, None, dy, x, gate, weight, eps)
    return [dx, dweight] if dgate is None else [dx, dgate, dweight]


def write_gradients(
    dgate: Tensor | None,
    y: Tensor | None,
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the gate into `dgate`, which may be [..., H, D] in a slice of wider rows, and the output of
    the forward pass into y, a contiguous tensor of the shape of x.

    Returns:
        dx, and dweight in float32.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # One part per program, which are added up afterwards: atomic additions have no fixed order.
    D = x.shape[-1]
    parts = torch.empty((triton.cdiv(x.numel() // D, ROWS), D), dtype=torch.float32, device=x.device)
    own = (dy.contiguous(), dx, dgate, y, parts)
    _launch(gated_rms_norm_backward_kernel, x, gate, weight, eps, BACKWARD_TILE, ROWS, own, dgate, ROWS=ROWS)
    return dx, parts.sum(0)


@_backward.register_fake
def _(dy, x, gate, weight, eps):
    dweight = x.new_empty(weight.shape, dtype=torch.float32)
    return [x.new_empty(x.shape), *([] if gate is None else [gate.new_empty(x.shape)]), dweight]


def _save(ctx, inputs, output):
    x, gate, weight, ctx.eps = inputs
    ctx.save_for_backward(x, gate, weight)


def _gradients(ctx, dy):
    x, gate, weight = ctx.saved_tensors
    dx, *dgate, dweight = torch.ops.lrnn.gated_rms_norm_backward(dy, x, gate, weight, ctx.eps)
    return dx, dgate[0] if dgate else None, dweight.to(weight.dtype), None


_forward.register_autograd(_gradients, setup_context=_save)


def compile_cases(D: int = 128) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield the kernels as training compiles them, for a GPU that need not be there.

    A case is (name, kernel, types of its arguments, values of its constants, warps, stages).
    """
    for dtype in ("bf16", "fp32"):
        types = {"weight": "*fp32", "dweight_parts": "*fp32", "R": "i32", "eps": "fp32"}
        constants = {"SX": D, "SG": D, "H": 1, "D": D, "BD": D, "HAS_GATE": True}
        cases: list[tuple[str, Any, dict[str, int | None]]] = [
            ("forward", gated_rms_norm_forward_kernel, {"BR": FORWARD_TILE // D}),
            ("backward", gated_rms_norm_backward_kernel, {"BR": BACKWARD_TILE // D, "ROWS": ROWS, "SDG": D, "y": None}),
        ]
        for name, kernel, own in cases:
            signature = {n: types.get(n, f"*{dtype}") for n in kernel.arg_names if n not in {**constants, **own}}
            yield f"gated_rms_norm_{name}_{dtype}", kernel, signature, {**constants, **own}, WARPS, 1
