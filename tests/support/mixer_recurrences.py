"""Recurrences of token mixers for tests: inputs, float64 truths, and a comparison of all results and gradients."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn.kernels.reference import diagonal
from lrnn.kernels.reference.documents import document_starts

Inputs = dict[str, Tensor]


def random(seed: int, *shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def diagonal_inputs(B: int, T: int, H: int, K: int, V: int, numbers: int, device: str = "cpu") -> Inputs:
    """Return q, k, v, logits of the decay (1 or K per head), and an initial state."""
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "logit": (B, T, H, numbers)}
    shapes["initial_state"] = (B, H, K, V)
    x = {name: random(seed, *shape, device=device) for seed, (name, shape) in enumerate(shapes.items())}
    return x | {"logit": 2 * x["logit"]}


def by_logit(rule: Callable, negative: bool) -> Callable:
    """Wrap a diagonal recurrence to take the logit of a, with decays a or 2a - 1. The logit then gets the gradient."""

    def run(q, k, v, logit, initial_state=None, **options):
        log_a = F.logsigmoid(logit)
        g, sign = diagonal.signed_decay(log_a) if negative else (log_a, None)
        return rule(q, k, v, g, sign, scale=0.3, initial_state=initial_state, **options)

    return run


def true_diagonal(q, k, v, g, sign, scale, initial_state=None, output_final_state=False, document=None):
    """Compute S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t token by token."""
    a = g.exp() if sign is None else sign * g.exp()
    if document is not None:
        a = a * ~document_starts(document)[..., None, None]
    o, state = diagonal.recurrent(q, k, v, a, initial_state)
    return scale * o, state if output_final_state else None


def rwkv7_inputs(B: int, T: int, H: int, K: int, V: int, negative: bool, device: str = "cpu") -> Inputs:
    """Return decays in the range of the mixer's, removal keys of norm 1, and rates as the mixer computes them."""
    x = {name: random(i, B, T, H, V if name == "v" else K, device=device) for i, name in enumerate("rkv")}
    x["w"] = 0.545 + 0.455 * random(3, B, T, H, K, device=device).sigmoid()
    x["kappa"] = F.normalize(random(4, B, T, H, K, device=device), dim=-1)
    x["a"] = random(5, B, T, H, K, device=device).sigmoid()
    if negative:
        x["a"] = x["a"] * (1 + x["w"].amin(-1, keepdim=True))
    return x | {"initial_state": random(6, B, H, K, V, device=device)}


def scan_inputs(B: int, T: int, D: int, N: int, device: str = "cpu") -> Inputs:
    x = {"x": random(0, B, T, D, device=device), "dt": 0.5 * random(1, B, T, D, device=device).abs()}
    x |= {"A": -random(2, D, N, device=device).abs(), "B": random(3, B, T, N, device=device)}
    return x | {"C": random(4, B, T, N, device=device), "initial_state": random(5, B, D, N, device=device)}


def compare(
    function: Callable,
    true_function: Callable,
    x: Inputs,
    rounded: str,
    dtype: torch.dtype,
    bars: dict[str, float],
    **options,
) -> None:
    """Compare all results and gradients of a function with those of its truth in float64, from the same values.

    Args:
        rounded: names of the inputs that have the dtype; the others are float32.
        bars: bounds of the error of an output or a gradient (d<name>), relative to its norm; the bar named "" is for
            names that are not listed.
    """
    x = {n: y.to(dtype) if n in rounded else y for n, y in x.items()}
    results = []
    for f, wide in ((function, None), (true_function, torch.float64)):
        leaves = {n: y.to(wide or y.dtype, copy=True).requires_grad_() for n, y in x.items()}
        o, state = f(**leaves, **options)
        loss = (o.double() * random(7, *o.shape, device=o.device).to(dtype).double()).sum()
        if state is not None:
            loss = loss + (state.double() * random(8, *state.shape, device=o.device)).sum()
        loss.backward()
        found = {"o": o, "state": state, **{f"d{n}": y.grad for n, y in leaves.items()}}
        results.append({n: y.detach() for n, y in found.items() if y is not None})
    ours, truth = results
    assert ours.keys() == truth.keys(), (sorted(ours), sorted(truth))
    odd = [n for n, y in ours.items() if y.shape != truth[n].shape or not y.isfinite().all()]
    assert not odd, f"not finite, or of another shape: {odd}"
    errors = {n: ((ours[n].double() - true).norm() / true.norm()).item() for n, true in truth.items()}
    print(", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    wrong = {n: e for n, e in errors.items() if not e <= bars.get(n, bars[""])}
    assert not wrong, wrong
