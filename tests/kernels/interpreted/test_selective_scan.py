"""Test Mamba's scan in Triton kernels against the recurrence in float64, with all gradients."""

import pytest
import torch

from lrnn.kernels.reference import steps as step_recurrences
from lrnn.kernels.selective_scan import selective_scan


def evaluate(function, x, dtype, **options):
    leaves = {n: y.to(dtype, copy=True).requires_grad_() for n, y in x.items()}
    y, state = function(**leaves, **options)
    r = torch.Generator().manual_seed(9)
    dy, dstate = (torch.randn(z.shape, generator=r) for z in (y, state))
    ((y * dy).sum() + (state * dstate).sum()).backward()
    return {"y": y, "state": state, **{f"d{n}": z.grad for n, z in leaves.items()}}


def inputs(T, D, N, with_state):
    r = torch.Generator().manual_seed(0)
    x = {"x": torch.randn(2, T, D, generator=r), "dt": torch.rand(2, T, D, generator=r)}
    x |= {"A": -2 * torch.rand(D, N, generator=r)}
    x |= {n: torch.randn(2, T, N, generator=r) for n in "BC"}
    return x | ({"initial_state": torch.randn(2, D, N, generator=r)} if with_state else {})


@pytest.mark.parametrize(
    ("T", "D", "N", "kind", "allow_neg_eigval"),
    [
        (1, 32, 16, "state", True),
        (31, 40, 16, "plain", False),
        (64, 32, 16, "state", True),
        (70, 70, 5, "documents", True),
        (37, 32, 5, "documents", False),
    ],
)
def test_all_results(T, D, N, kind, allow_neg_eigval):
    x = inputs(T, D, N, with_state=kind == "state")
    options = {"allow_neg_eigval": allow_neg_eigval}
    if kind == "documents":
        options["document"] = (torch.arange(2 * T) // 9).view(2, T)
    found = evaluate(selective_scan, x, torch.float32, **options)
    true = evaluate(step_recurrences.selective_scan, x, torch.float64, **options)
    for name, truth in true.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - truth).norm() <= 1e-5 * truth.norm(), name
        assert truth.norm() > 0, name


def test_without_gradients():
    x = inputs(40, 32, 16, with_state=True)
    with torch.no_grad():
        y, state = selective_scan(**x, allow_neg_eigval=True)
        y_true, state_true = step_recurrences.selective_scan(**x, allow_neg_eigval=True)
    torch.testing.assert_close(y, y_true, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, state_true, atol=1e-4, rtol=1e-4)
