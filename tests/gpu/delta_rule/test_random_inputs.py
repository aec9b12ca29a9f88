"""Test random inputs: lengths, head sizes, groups, factors, segments."""

import math

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_compare import compare, compare_fused
from delta_rule_inputs import BARS
from delta_rule_on_gpu import BF16, FP16, FP32, LIMITS, random
from delta_rule_truth import check, evaluate, evaluate_truth, floors

from lrnn.kernels.delta_rule import cut, segments
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_product, gated_delta_rule
from lrnn.kernels.delta_rule.portable import segment_reach


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("raw", [False, True])
def test_random(raw, dtype):
    x = random(2, 1000, dtype=dtype, raw=raw)
    if raw:
        compare_fused(x, BARS[dtype], f"raw, {dtype}")
    else:
        compare(x, BARS[dtype], f"T 1000, {dtype}", normalize_qk=True)


def test_random_long():
    compare_fused(random(1, 4096, H=4, raw=True), BARS[BF16], "raw, T 4096")


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 127, 1000, 4097])
def test_lengths(T, dtype):
    H = 16 if T < 64 else 1  # enough numbers for a norm
    compare(random(2, T, H=H, dtype=dtype), BARS[dtype], f"T {T}, {dtype}", normalize_qk=True)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("V", [64, 128, 256])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_head_sizes(K, V, dtype):
    compare_fused(random(1, 130, K=K, V=V, dtype=dtype, raw=True), BARS[dtype], f"K {K}, V {V}, {dtype}")


@pytest.mark.parametrize("H", [1, 3, 16])
def test_heads(H):
    # The gradients of A_log and dt_bias are one number per head, a sum of either sign. With one head it may be near 0.
    bars = BARS[BF16] | ({"dA_log": 5e-2, "ddt_bias": 5e-2} if H == 1 else {})
    compare_fused(random(2, 130, H=H, raw=True), bars, f"{H} heads")


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_value_heads(groups):
    compare_fused(random(2, 130, H=2, HV=2 * groups, raw=True), BARS[BF16], f"{groups} value heads a key head")


def test_step_sizes_and_gates_of_half_precision():
    x = random(2, 130)
    x |= {n: x[n].to(BF16) for n in ("g", "beta")}
    compare(x, LIMITS[BF16], "g and beta in bf16", normalize_qk=True)


def test_keys_as_given():
    compare(inputs.unit_keys(random(2, 300)), BARS[BF16], "keys as given")


def test_eigenvalues_between_0_and_1_and_no_gate():
    x = random(2, 300, raw=True)
    compare_fused(x, BARS[BF16], "beta below 1", beta_range=1.0)
    # Nothing decays, so the rounding of all chunks adds up.
    compare_fused(x | {"a": None, "A_log": None, "dt_bias": None}, LIMITS[BF16], "no gate")


@pytest.mark.parametrize("of", ["output", "state"])
def test_gradient_of_one_result_alone(of):
    x = random(2, 200)
    do, dstate = inputs.arriving(x)
    alone = (do, None) if of == "output" else (None, dstate)
    expected = evaluate_truth(truth.gated_delta_rule, x, *alone, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, *alone, normalize_qk=True)
    check(found, expected, BARS[BF16], f"{of} alone", floors(expected, do))


@pytest.mark.parametrize("T", [300, 320])  # full chunks take the kernels for Hopper, unless there are three factors
@pytest.mark.parametrize("n_h", [2, 3, 4])
def test_product(n_h, T):
    x = random(2, T * n_h)
    x |= {n: x[n].unflatten(1, (T, n_h)) for n in ("k", "v", "beta")} | {n: x[n][:, :T] for n in ("q", "g")}
    do, dstate = inputs.arriving(x)
    do = do[:, :, 0]
    expected = evaluate_truth(truth.gated_delta_product, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_product, x, do, dstate, normalize_qk=True)
    check(found, expected, BARS[BF16], f"{n_h} factors, T {T}")


@pytest.mark.parametrize("n_h", [2, 4])
def test_product_in_segments(n_h):
    """One long sequence is cut into segments that are scanned side by side."""
    T = 8192 // n_h
    x = random(1, T * n_h, H=1)
    x |= {n: x[n].unflatten(1, (T, n_h)) for n in ("k", "v", "beta")} | {n: x[n][:, :T] for n in ("q", "g")}
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_product, x, do[:, :, 0], dstate, normalize_qk=True)
    check(evaluate(gated_delta_product, x, do[:, :, 0], dstate, normalize_qk=True), expected, BARS[BF16], "segments")


def test_long_sequence_in_segments():
    """One long sequence is cut into segments that are scanned side by side."""
    assert cut.count_segments(1, 8192, 1, 128, 128, BF16) > 1, "this length is not cut any more"
    compare_fused(random(1, 8192, H=1, raw=True), BARS[BF16], "segments")
    x = inputs.set_keys(inputs.set_gates(random(1, 8192, H=1, dtype=FP32), "one"), "random")
    compare(x, {"": 1e-4}, "segments without decay, float32", normalize_qk=True)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_skipping_chunks_that_do_not_reach_the_end_of_a_segment_changes_nothing(dtype, monkeypatch):
    """With heads that forget within a chunk, a segment, or never, the results are the same bits as without skipping."""
    x = random(1, 16384, H=3, dtype=dtype, raw=True)
    x["A_log"] = torch.tensor([8.0, 0.2, 1e-4], device="cuda").log()
    do, dstate = inputs.arriving(x)
    reaches, find = [], segments.find_reach
    monkeypatch.setattr(segments, "find_reach", lambda *a, **o: reaches.append(find(*a, **o)) or reaches[-1])
    found = evaluate(fused_gated_delta_rule, x, do, dstate)
    first, lost, _ = reaches[0][0].T.tolist()
    chunks = cut.SEGMENT // 64
    assert 0 < first[1] < first[0] == chunks - 1 and first[2] == 0 and lost == [chunks, chunks, 0], reaches[0]
    monkeypatch.setattr(segment_reach, "LEAST", -math.inf)
    whole = evaluate(fused_gated_delta_rule, x, do, dstate)
    assert not reaches[2][:-1, :, :2].any() and all(torch.equal(found[n], whole[n]) for n in whole)
