"""Test precision="split" of the gated delta rule: it carries states more exactly, and changes nothing else."""

import os

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import numpy as np
import pytest
import torch
import triton.language as tl
from delta_rule_inputs import BARS
from delta_rule_truth import check, evaluate, evaluate_truth, floors, relative_error
from operator_calls import OperatorCalls
from triton.runtime import interpreter

from lrnn.kernels.delta_rule import cut
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_product, gated_delta_rule
from lrnn.kernels.reference import delta_rule as delta_rule_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = ("standard", "split")
TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # also run the cases that only combine again what others contain


@pytest.fixture
def bfloat16(monkeypatch):
    """Fix the interpreter's bfloat16, which truncates instead of rounding, and multiplies the bits as integers."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widened(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype == tl.bfloat16 else x

    def cast_rounding(self, x, dtype):
        if x.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).to(BF16)
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, x if dtype.scalar == tl.bfloat16 else widened(x), dtype)

    monkeypatch.setattr(builder, "cast_impl", cast_rounding)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))


def carried_states(kind, dtype, T=320, H=1):
    """Return relative errors (final state, gradient of the first) by precision, for reflections, no gate and v = 0."""
    x = inputs.set_keys(inputs.random(1, T, H=H, dtype=dtype), kind)
    x = inputs.set_betas(inputs.set_gates(x, "one"), "2")
    x["v"].zero_()
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_rule, x, do * 0, dstate, normalize_qk=True)
    errors = {}
    for precision in PRECISIONS:
        found = evaluate(gated_delta_rule, x, do * 0, dstate, normalize_qk=True, precision=precision)
        errors[precision] = [relative_error(found[n], expected[n]) for n in ("final_state", "dinitial_state")]
        print(f"{kind}, {dtype}, T {T}, {precision}: state and gradient", *(f"{e:.2e}" for e in errors[precision]))
    return zip(*(errors[precision] for precision in PRECISIONS), strict=True)


# With two keys, the rounding of C and of beta X, which are not split, is the larger part of the error.
@pytest.mark.parametrize(("kind", "gain"), [("2 keys", 1.1), ("swaps", 4), *([("8 keys", 2)] if TORTURE else [])])
def test_bfloat16_carries_states_more_exactly(kind, gain, bfloat16):
    for standard, split in carried_states(kind, BF16):
        assert gain * split < standard


def test_float16_gains_little():
    """In float16, C and beta X, which are not split, are rounded as coarsely as the values that enter the state."""
    for standard, split in carried_states("swaps", FP16, T=512, H=1):
        assert 1.3 * split < standard


# In float32 the precision changes nothing; see below.
@pytest.mark.parametrize(("raw", "dtype"), [(False, BF16), (False, FP16), (True, BF16)])
def test_all_results_with_documents_and_states(raw, dtype, bfloat16):
    bounds = torch.tensor([0, 0, 1, 66, 130])
    x = inputs.random(1, 130, H=2, dtype=dtype, states=4, raw=raw)
    ours, true = (fused_gated_delta_rule, truth.fused_gated_delta_rule) if raw else (
        gated_delta_rule, truth.gated_delta_rule)  # fmt: skip
    options = {"cu_seqlens": bounds} | ({} if raw else {"normalize_qk": True})
    do, dstate = inputs.arriving(x)
    found = evaluate(ours, x, do, dstate, **options, precision="split")
    expected = evaluate_truth(true, x, do, dstate, **options)
    check(found, expected, BARS[dtype], f"documents, {dtype}, raw {raw}", floors(expected, do))


def test_segments_and_wide_heads(bfloat16, monkeypatch):
    dtype = BF16
    monkeypatch.setattr(cut, "SEGMENT", 64)
    x = inputs.random(1, 256, H=2, K=128, dtype=dtype)  # the gradient of g of a single head may be small by chance
    assert cut.count_segments(1, 256, 2, 128, 128, dtype) == 4
    do, dstate = inputs.arriving(x)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True, precision="split")
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    check(found, expected, BARS[dtype], f"segments, {dtype}", floors(expected, do))


def test_product_passes_it_on():
    x = inputs.random(1, 80, H=1, dtype=FP16)
    factors = {n: x[n].unflatten(1, (40, 2)) for n in ("k", "v", "beta")}
    x |= factors | {n: x[n][:, ::2].contiguous() for n in ("q", "g")}
    with torch.no_grad(), OperatorCalls() as calls:
        gated_delta_product(**x, normalize_qk=True, precision="split")
    assert calls.made["lrnn::gated_delta_rule_forward"][1][-2] == "split"


def test_float32_and_short_sequences_are_as_before():
    x = inputs.random(1, 70, H=1)
    standard, split = (
        evaluate(gated_delta_rule, x, *inputs.arriving(x), normalize_qk=True, precision=p) for p in PRECISIONS
    )
    assert all(torch.equal(standard[n], split[n]) for n in standard)
    x = inputs.random(1, 9, H=1, dtype=FP16)
    with torch.no_grad():
        (o, _), (o_split, _) = (gated_delta_rule(**x, normalize_qk=True, precision=p) for p in PRECISIONS)
    assert torch.equal(o, o_split)


def test_operators_get_the_precision():
    x = inputs.random(1, 2, H=1, dtype=FP16, raw=True)
    with OperatorCalls() as calls:
        evaluate(fused_gated_delta_rule, x, *inputs.arriving(x), precision="split")
    for name, place in (("forward", -2), ("backward", -7)):
        assert calls.made[f"lrnn::gated_delta_rule_{name}"][1][place] == "split"


@pytest.mark.parametrize("module", [None, delta_rule_reference])
def test_unknown_precision(module):
    x = inputs.random(1, 2, H=1, dtype=FP16)
    raw = inputs.random(1, 2, H=1, dtype=FP16, raw=True)
    factors = x | {n: x[n][:, :, None] for n in ("k", "v", "beta")}
    functions = (gated_delta_rule, fused_gated_delta_rule, gated_delta_product)
    for function, arguments in zip(functions, (x, raw, factors), strict=True):
        used = function if module is None else getattr(module, function.__name__)
        with pytest.raises(ValueError, match="precision must be one of 'standard', 'split'; got 'fast'"):
            used(**arguments, precision="fast")
