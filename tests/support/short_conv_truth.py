"""The short convolution computed by PyTorch's own, document by document in float64, and inputs for it."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds of the error of an output or a gradient, relative to its norm. It comes from rounding the result, or from sums
# in float32.
BARS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def short_conv_truth(xs, weights, before=None, cu_seqlens=None) -> list[Tensor]:
    """Convolve each row of the batch, and with `cu_seqlens` each document in it, by itself."""
    B, T, _ = xs[0].shape
    cuts = {b * T for b in range(B + 1)} | set([] if cu_seqlens is None else cu_seqlens.tolist())
    ys = []
    for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
        taps = weight.shape[-1]
        pieces = []
        for start, end in pairwise(sorted(cuts)):
            piece = x.double().flatten(0, 1)[start:end]
            is_ahead = before is not None and start % T == 0  # of the first document of a row
            ahead = before[i][start // T].double() if is_ahead else piece.new_zeros(taps - 1, piece.shape[1])
            joined = torch.cat([ahead, piece]).mT[None]
            pieces.append(F.silu(F.conv1d(joined, weight.double(), groups=weight.shape[0]))[0].mT)
        ys.append(torch.cat(pieces).view(x.shape))
    return ys


def make(B, T, widths, taps=4, dtype=torch.float32, weight_dtype=torch.float32, device="cpu", seed=0, before=False):
    """Return random inputs as leaves, and gradients of the outputs: (xs, weights, before or None, dys)."""
    r = torch.Generator(device).manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=r, device=device).to(dtype)

    xs = [normal(B, T, D).requires_grad_() for D in widths]
    weights = [normal(D, 1, taps, dtype=weight_dtype).requires_grad_() for D in widths]
    ahead = [normal(B, taps - 1, D) for D in widths] if before else None
    return xs, weights, ahead, [normal(B, T, D) for D in widths]


def outputs_and_gradients(function, xs, weights, dys, **options) -> list[Tensor]:
    """Return the output for each x, then the gradients of each x and of each weight."""
    ys = function(xs, weights, **options)
    arriving = [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [*xs, *weights], arriving)]


def true_outputs_and_gradients(xs, weights, dys, **options) -> list[Tensor]:
    """Compute in float64 throughout, since autograd adds up the parts of a gradient in the dtype of its leaf."""
    xs, weights = ([t.detach().double().requires_grad_() for t in group] for group in (xs, weights))
    return outputs_and_gradients(short_conv_truth, xs, weights, dys, **options)


def check(found: list[Tensor], truth: list[Tensor], xs, weights, label="") -> None:
    """Check that each result has the dtype of its tensor, and differs from the truth by less than that dtype's bar."""
    belongs = [*xs, *xs, *weights]
    names = [f"{kind}{i}" for kind in ("y", "dx", "dweight") for i in range(len(xs))]
    for name, x, y, of in zip(names, found, truth, belongs, strict=True):
        assert x.dtype == of.dtype and x.shape == of.shape, f"{label} {name}: {x.dtype} {x.shape}"
        assert x.isfinite().all(), f"{label} {name} has NaN or infinity"
        error = ((x.double() - y).norm() / y.norm().clamp(min=1e-12)).item()
        assert error < BARS[of.dtype], f"{label} {name}: relative error {error:.1e}"


def boundaries(lengths: list[int], dtype=torch.int32, device="cpu") -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0).to(dtype)
