"""Test inputs that break implementations: repeated keys, and gates and step sizes at their limits."""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_compare import compare, compare_fused, compare_short_vectors
from delta_rule_inputs import BARS, BETAS, GATES, KEYS
from delta_rule_on_gpu import BF16, FP16, FP32, HARD, LIMITS, random
from delta_rule_truth import check, evaluate, evaluate_truth

from lrnn.kernels.delta_rule.api import gated_delta_rule


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", KEYS)
def test_repeated_keys(kind, dtype):
    x = inputs.set_gates(inputs.set_keys(random(1, 200, H=1, dtype=dtype), kind), "none")
    for beta in ("2", "1.9"):
        compare(inputs.set_betas(x, beta), HARD[dtype], f"{kind}, beta {beta}, {dtype}", normalize_qk=True)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", BETAS)
def test_step_sizes(kind, dtype):
    x = inputs.set_betas(random(2, 200, dtype=dtype), kind)
    compare(x, LIMITS[dtype], f"beta {kind}, {dtype}", normalize_qk=True)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind, dtype):
    x = inputs.set_gates(random(2, 200, H=4, dtype=dtype), kind)
    compare(x, LIMITS[dtype], f"gates {kind}, {dtype}", normalize_qk=True)


def test_zero_vectors():
    compare_short_vectors(random(2, 100, dtype=FP32), BARS[FP32])


def test_first_gate_has_no_gradient_without_a_state():
    x = random(2, 100, states=0)
    found = evaluate(gated_delta_rule, x, torch.randn_like(x["v"]), normalize_qk=True)
    assert found["dg"][:, 0].abs().max() < 1e-2 * found["dg"].abs().max()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_raw_projections_at_their_limits(dtype):
    """Test logits of +-40 (beta of 2 and 0), raw gates of +-40, and -inf for both, which leaves the state unchanged."""
    x = random(2, 200, raw=True, dtype=dtype)
    x["b"][:, ::4], x["b"][:, 1::4] = 40.0, -40.0
    x["a"][:, ::3], x["a"][:, 1::6] = -40.0, 40.0
    x["a"][:, 10:13] = x["b"][:, 10:13] = -float("inf")
    compare_fused(x, LIMITS[dtype], f"limits, {dtype}")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_all_ones(dtype):
    """Triton compiles arguments that equal 1 as constants. scale = 1 is one of them."""
    x = {n: torch.ones_like(y) for n, y in random(2, 200, dtype=dtype).items()} | {"g": None}
    # All vectors are parallel, and so are the gradients of q and k before the norm's part is taken out of them.
    compare(x, LIMITS[dtype], f"ones, {dtype}", zero=("dq", "dk"), normalize_qk=True, scale=1.0)


def test_rows_of_a_batch_are_independent():
    x = random(2, 70)
    do, dstate = inputs.arriving(x)
    for y in (x["q"], x["k"], x["v"], do):
        y[1] *= 1000
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    for i in (0, 1):
        check({n: y[i] for n, y in found.items()}, {n: y[i] for n, y in expected.items()}, BARS[BF16], f"row {i}")
