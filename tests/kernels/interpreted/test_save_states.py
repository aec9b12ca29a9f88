"""Test `save_states` of the gated delta rule: equal bits, one scan less backward, and when nothing is kept."""

import delta_rule_inputs as inputs
import pytest
import torch
from delta_rule_truth import evaluate
from operator_calls import OperatorCalls

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule import cut
from lrnn.kernels.delta_rule import operator as delta_rule_op
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_product, gated_delta_rule, saving_states
from lrnn.kernels.delta_rule.call import Call
from lrnn.kernels.delta_rule.portable.backend import Portable

FP16, FP32 = torch.float16, torch.float32


@pytest.fixture
def forward_scans(monkeypatch):
    """Return a list that receives the names of the results of each forward scan, in the order of launches."""
    filled, forward_scan = [], Portable.forward_scan

    def note(call, operands, initial, final, **results):
        filled.append({name for name, x in results.items() if x is not None})
        forward_scan(call, operands, initial, final, **results)

    monkeypatch.setattr(Portable, "forward_scan", staticmethod(note))
    return filled


def compare(x, forward_scans, function=fused_gated_delta_rule, segments=False, **options):
    """Compare all results with and without `save_states`, bit by bit."""
    arriving = inputs.arriving(x)
    first_pass = [{"reach"}] if segments else []
    plain = evaluate(function, x, *arriving, **options)
    assert forward_scans == [*first_pass, {"o"}, {"y", "states"}]
    forward_scans.clear()
    saved = evaluate(function, x, *arriving, **options, save_states=True)
    assert forward_scans == [*first_pass, {"o", "y", "states"}]
    assert saved.keys() == plain.keys() and all(torch.equal(saved[n], plain[n]) for n in plain)


@pytest.mark.parametrize(
    ("T", "precision", "dtype"), [(70, "standard", FP16), (128, "split", FP16), (70, "standard", FP32)]
)
def test_the_same_bits(T, precision, dtype, forward_scans):
    compare(inputs.random(1, T, H=1, HV=2, dtype=dtype, raw=True), forward_scans, precision=precision)


def test_documents(forward_scans):
    bounds = torch.tensor([0, 0, 1, 66, 80])
    compare(inputs.random(2, 40, H=1, dtype=FP16, states=4, raw=True), forward_scans, cu_seqlens=bounds)


def test_segments(forward_scans, monkeypatch):
    """The scan of the chunks that reach the ends of segments saves nothing."""
    monkeypatch.setattr(cut, "SEGMENT", CHUNK)
    x = inputs.random(1, 256, H=1, dtype=FP16, raw=True)
    assert cut.count_segments(1, 256, 1, 64, 64, FP16) == 4
    compare(x, forward_scans, segments=True, precision="split")


def test_the_default_is_that_of_the_context(forward_scans):
    x = inputs.random(1, 20, H=1, dtype=FP16, raw=True)
    x["v"].requires_grad_()
    with saving_states():
        fused_gated_delta_rule(**x)
        fused_gated_delta_rule(**x, save_states=False)
    with pytest.raises(KeyError), saving_states():
        raise KeyError
    fused_gated_delta_rule(**x)
    assert forward_scans == [{"o", "y", "states"}, {"o"}, {"o"}]


@pytest.mark.parametrize(("K", "V", "dtype"), [(128, 256, FP16), (32, 48, FP32)])
def test_head_sizes_and_no_gate(K, V, dtype, forward_scans):
    x = inputs.set_gates(inputs.random(1, 20, H=1, K=K, V=V, dtype=dtype), "none")
    compare(x, forward_scans, gated_delta_rule, normalize_qk=True)


@pytest.mark.parametrize(("K", "dtype"), [(256, FP16), (128, FP32)])
def test_states_that_would_not_fit_are_recomputed(K, dtype, forward_scans):
    x = inputs.random(1, 20, H=1, K=K, V=64, dtype=dtype)
    found = [
        evaluate(gated_delta_rule, x, *inputs.arriving(x), normalize_qk=True, save_states=s) for s in (True, False)
    ]
    assert forward_scans == 2 * [{"o"}, {"y", "states"}]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_nothing_is_kept_without_gradients(mode, forward_scans):
    x = inputs.random(1, 20, H=1, dtype=FP16)
    if mode is None:  # gradients are enabled, but no tensor requires one
        gradient = torch.enable_grad()
    else:
        gradient = mode()
        x["v"].requires_grad_()
    with gradient:
        gated_delta_rule(**x, normalize_qk=True, save_states=True)
    assert forward_scans == [{"o"}]


def test_results_of_the_operator():
    x = inputs.random(2, 70, H=1, HV=2, K=64, V=128, dtype=FP16)
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"], None, None, None, 1.0, True, None, False, None, "standard")
    call = Call.of(x["q"], x["k"], x["v"], x["g"], None, None, 1.0, True, None, "standard")
    for run in (
        lambda saves: delta_rule_op.gated_delta_rule_forward(*arguments, saves)[-2:],
        lambda saves: delta_rule_op._forward_results(call, False, saves)[-2:],
    ):
        y, states = run(True)
        assert y.shape == (140, 2 * 128) and states.shape == (2 * 2 * 2 * 128, 64)
        assert y.dtype == states.dtype == FP16
        assert all(y.numel() == 0 and y.dtype == FP16 for y in run(False))


def test_product_passes_it_on(forward_scans):
    x = inputs.random(1, 20, H=1, dtype=FP16)
    factors = {n: x[n].unflatten(1, (10, 2)) for n in ("k", "v", "beta")}
    x |= factors | {n: x[n][:, ::2].contiguous().requires_grad_() for n in ("q", "g")}
    gated_delta_product(**x, normalize_qk=True, save_states=True)
    assert forward_scans == [{"o", "y", "states"}]


def test_operators_pass_opcheck():
    x = inputs.random(1, 2, H=1, dtype=FP16, raw=True)
    with OperatorCalls() as calls:
        evaluate(fused_gated_delta_rule, x, *inputs.arriving(x), save_states=True)
    assert calls.made["lrnn::gated_delta_rule_forward"][1][-1] is True
    del calls.made["lrnn::gated_delta_rule_backward"]  # its results are the same
    calls.opcheck()


def test_compiled_results_are_the_same(forward_scans):
    x = inputs.random(1, 20, H=1, dtype=FP16)
    arriving = inputs.arriving(x)
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")
    found = [evaluate(f, x, *arriving, normalize_qk=True, save_states=True) for f in (compiled, gated_delta_rule)]
    assert forward_scans == 2 * [{"o", "y", "states"}]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
