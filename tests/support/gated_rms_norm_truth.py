"""The gated RMS norm in float64, written out, and inputs for it."""

import torch
from torch import Tensor

# Bounds of the error of an output or a gradient, relative to its norm. It comes from rounding the result, or from sums
# in float32.
BARS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}


def gated_rms_norm_truth(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    y = x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight
    return y if gate is None else y * gate.double() / (1 + torch.exp(-gate.double()))


def make(shape, dtype=torch.float32, gate_dtype=None, weight_dtype=torch.float32, gated=True, device="cpu", seed=0):
    """Return random inputs as leaves, and a gradient of the output: (x, gate or None, weight, dy)."""
    r = torch.Generator(device).manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=r, device=device).to(dtype)

    x = normal(*shape).requires_grad_()
    gate = normal(*shape, dtype=gate_dtype or dtype).requires_grad_() if gated else None
    return x, gate, normal(shape[-1], dtype=weight_dtype).requires_grad_(), normal(*shape, dtype=gate_dtype or dtype)


def output_and_gradients(function, x, gate, weight, dy, eps=1e-6) -> dict[str, Tensor]:
    y = function(x, gate, weight, eps)
    leaves = {"x": x, "gate": gate, "weight": weight} if gate is not None else {"x": x, "weight": weight}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": d for n, d in zip(leaves, gradients, strict=True)}}


def true_output_and_gradients(x, gate, weight, dy, eps=1e-6) -> dict[str, Tensor]:
    """Compute in float64 throughout, since autograd adds up the parts of a gradient in the dtype of its leaf."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, gate, weight)]
    return output_and_gradients(gated_rms_norm_truth, *leaves, dy, eps)


def check(found: dict[str, Tensor], truth: dict[str, Tensor], x, gate, weight, label="") -> None:
    """Check that each result has the dtype of its tensor, and differs from the truth by less than that dtype's bar."""
    belongs = {"y": x if gate is None else gate, "dx": x, "dgate": gate, "dweight": weight}
    assert found.keys() == truth.keys()
    for name, z in found.items():
        of = belongs[name]
        assert z.dtype == of.dtype and z.shape == of.shape, f"{label} {name}: {z.dtype} {z.shape}"
        assert z.isfinite().all(), f"{label} {name} has NaN or infinity"
        error = ((z.double() - truth[name]).norm() / truth[name].norm().clamp(min=1e-12)).item()
        assert error < BARS[of.dtype], f"{label} {name}: relative error {error:.1e}"
