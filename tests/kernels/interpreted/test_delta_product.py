"""Test the kernels with several factors per token against the float64 recurrence, in the interpreter.

They compute outputs after the last factors alone. The reference in PyTorch computes one after every factor.
"""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
import torch.nn.functional as F
from delta_rule_inputs import BARS
from delta_rule_truth import check, evaluate, evaluate_truth, relative_error

from lrnn.kernels.delta_rule import cut
from lrnn.kernels.delta_rule.api import (
    fused_gated_delta_product,
    fused_gated_delta_rule,
    gated_delta_product,
    gated_delta_rule,
)
from lrnn.kernels.reference import delta_rule as reference

FP16, FP32 = torch.float16, torch.float32


def factors(B, T, n_h, raw=False, **options):
    """Return random inputs of T tokens with n_h factors each."""
    x = inputs.random(B, T * n_h, raw=raw, **options)
    by_factor, by_token = ("k", "v", "b" if raw else "beta"), ("q", "a" if raw else "g")
    x |= {n: x[n].unflatten(1, (T, n_h)) for n in by_factor}
    return x | {n: x[n][:, :T].contiguous() for n in by_token}


def arriving(x):
    do, dstate = inputs.arriving(x)
    return do[:, :, 0].contiguous(), dstate


def raw_truth(q, k, v, a, b, A_log, dt_bias, **options):
    g = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double())
    return truth.gated_delta_product(q, k, v, g, 2 * b.double().sigmoid(), normalize_qk=True, **options)


def compare(x, label, ours=gated_delta_product, true=truth.gated_delta_product, saves=False, **options):
    do, dstate = arriving(x)
    expected = evaluate_truth(true, x, do, dstate, **options)
    if saves:
        options["save_states"] = True
    check(evaluate(ours, x, do, dstate, **options), expected, BARS[x["v"].dtype], label)


# Chunks have 64 steps, or 63 with three factors: 32, 21 and 16 tokens. The second length fills the last chunk.
@pytest.mark.parametrize(
    ("n_h", "T", "dtype", "saves"),
    [
        (2, 35, FP32, False),
        (2, 64, FP16, True),
        (3, 43, FP32, True),
        (3, 42, FP16, False),
        (4, 17, FP16, True),
        (4, 32, FP32, False),
        (7, 10, FP32, False),
    ],
)
def test_lengths(n_h, T, dtype, saves):
    x = factors(1, T, n_h, H=1, dtype=dtype)
    compare(x, f"{n_h} factors, T {T}, {dtype}", saves=saves, normalize_qk=True)


def test_keys_as_given_without_a_gate():
    x = inputs.unit_keys(factors(1, 34, 2, H=1))
    compare(x | {"g": None}, "keys as given", scale=0.3)


def test_strong_gates():
    """The gate acts on the first factor of a token alone. What it leaves of a chunk's start is zero at the end."""
    x = factors(1, 40, 2, H=1)
    x["g"][:, ::3], x["g"][:, 20] = -20.0, -200.0
    compare(x, "strong gates", normalize_qk=True)


@pytest.mark.parametrize(("n_h", "dtype"), [(2, FP16), (3, FP32), (4, FP32)])
def test_documents_with_raw_gates(n_h, dtype):
    """Chunks of documents end where they end. Value heads share keys, and one document is empty."""
    bounds = torch.tensor([0, 1, 1, 24, 50], dtype=torch.int32)
    x = factors(2, 25, n_h, raw=True, H=1, HV=2, dtype=dtype, states=4)
    compare(x, f"{n_h} factors", fused_gated_delta_product, raw_truth, cu_seqlens=bounds)


def test_segments(monkeypatch):
    monkeypatch.setattr(cut, "SEGMENT", 64)
    x = factors(1, 128, 2, H=1, dtype=FP16)
    compare(x, "segments", normalize_qk=True)


@pytest.mark.parametrize("n_h", [2, 3])
def test_few_tokens_without_gradients(n_h):
    """They take the recurrence, from which the chunks may continue."""
    x = factors(2, 5, n_h, raw=True, dtype=FP32)
    o_true, final_true = raw_truth(**x, output_final_state=True)
    with torch.no_grad():
        o, final = fused_gated_delta_product(**x, output_final_state=True)
    assert o.shape == o_true.shape
    assert relative_error(o, o_true) < 1e-5 and relative_error(final, final_true) < 1e-5


def test_one_factor_is_the_rule():
    """All bits are equal."""
    x = factors(1, 70, 1, H=1, dtype=FP16)
    do, dstate = arriving(x)
    found = evaluate(gated_delta_product, x, do, dstate, normalize_qk=True)
    one = x | {n: x[n][:, :, 0] for n in ("k", "v", "beta")}
    for name, expected in evaluate(gated_delta_rule, one, do, dstate, normalize_qk=True).items():
        assert torch.equal(found[name].reshape(expected.shape), expected), name


def test_reference_of_raw_gates():
    x = factors(1, 9, 2, raw=True)
    do, dstate = arriving(x)
    found = evaluate(reference.fused_gated_delta_product, x, do, dstate)
    check(found, evaluate_truth(raw_truth, x, do, dstate), BARS[FP32], "reference")


def test_outputs_are_by_token():
    """They are not a part of a larger tensor with an output for every factor."""
    o, _ = gated_delta_product(**factors(1, 33, 3, H=1), normalize_qk=True)
    assert o.untyped_storage().nbytes() == 33 * 64 * 4


def test_many_factors_are_refused():
    with pytest.raises(ValueError, match="the kernels support up to 16 factors per token; got 17"):
        gated_delta_product(**factors(1, 2, 17))
    with pytest.raises(ValueError, match=r"b must be \[B, T, n_h, HV\] = \[1, 2, 2, 2\]; got \[1, 2, 1, 2\]"):
        x = factors(1, 2, 2, raw=True)
        fused_gated_delta_product(**x | {"b": x["b"][:, :, :1]})


def test_signature_is_that_of_the_rule():
    assert fused_gated_delta_product.__annotations__ == fused_gated_delta_rule.__annotations__
