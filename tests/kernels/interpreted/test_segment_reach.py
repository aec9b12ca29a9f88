"""Test which chunks of a segment reach its ends, and that scans which skip the others find the same numbers."""

import math

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_inputs import BARS
from delta_rule_truth import check, evaluate, evaluate_truth, floors

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule import cut, segments
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_rule
from lrnn.kernels.delta_rule.portable import segment_reach
from lrnn.kernels.delta_rule.portable.segment_reach import LEAST, SEGMENT_REACH, segment_reach_kernel


def find_reach(totals, segments, least=LEAST, has_start=True, save_last=True):
    """Return the kernel's result from the log-gates (base 2) of whole chunks, [HV, N, chunks]."""
    HV, N, chunks = totals.shape
    vectors = torch.full((HV, 4, N * chunks, CHUNK), torch.nan)
    vectors[:, 0, :, -1] = totals.flatten(1)
    reach = torch.full((N, HV, 3), -1, dtype=torch.int32)
    sizes = {"HV": HV, "BT": CHUNK, "HAS_START": has_start, "SAVE_LAST": save_last, **SEGMENT_REACH}
    numbers = segments, chunks, N * chunks * CHUNK, least
    launch(segment_reach_kernel, (N, HV, 1), reach, vectors.flatten(0, 1), *numbers, **sizes)
    return reach


@pytest.mark.parametrize("chunks", [1, 5, 64, 150])
@pytest.mark.parametrize(("has_start", "save_last"), [(True, True), (False, True), (True, False)])
def test_reach_agrees_with_a_slow_sum(chunks, has_start, save_last):
    r = torch.Generator().manual_seed(chunks)
    strengths = torch.tensor([0.0, 1.0, 8.0, 400.0])[:, None, None]
    # multiples of 1/8, so that sums are exact in any order
    totals = -(strengths * torch.rand(4, 6, chunks, generator=r) * 8).round() / 8
    found = find_reach(totals, 3, has_start=has_start, save_last=save_last)
    seen = set()
    for h, n in torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist():
        g = totals[h, n].tolist()
        first = next(c for c in range(chunks) if sum(g[c + 1 :]) >= LEAST)
        count = 1 + max(c for c in range(chunks) if sum(g[:c]) >= LEAST)
        kept = sum(g) >= LEAST and (has_start or n % 3 > 0) and (save_last or n % 3 < 2)
        is_first, is_last = n % 3 == 0, n % 3 == 2
        expected = [chunks if is_last else first, 0 if kept else chunks, 0 if is_first and not has_start else count]
        assert found[n, h].tolist() == expected, (h, n)
        seen.add((first > 0, kept, count < chunks))
    assert len(seen) > 1 or chunks == 1
    if has_start and save_last:
        assert find_reach(totals, 3, least=-math.inf)[:3, :, 1:].tolist() == [[[0, chunks]] * 4] * 3


def test_nan_gates_skip_nothing():
    totals = torch.full((1, 3, 70), -50.0)
    totals[0, 0, 40] = torch.nan
    assert find_reach(totals, 3)[0, 0].tolist() == [0, 0, 70]


def test_gates_that_erase():
    """With a log-gate of -inf, its own chunk may be scanned needlessly, and no transition is left."""
    totals = torch.zeros(1, 3, 70)
    totals[0, 0, 40] = -torch.inf
    assert find_reach(totals, 3)[0, 0].tolist() == [40, 70, 41]


def in_segments(x, monkeypatch, function=fused_gated_delta_rule, **options):
    """Return outputs and gradients, and the numbers of skipped and of all chunks, with segments of two chunks."""
    monkeypatch.setattr(cut, "SEGMENT", 2 * CHUNK)
    reaches, find = [], segments.find_reach
    monkeypatch.setattr(segments, "find_reach", lambda *a, **o: reaches.append(find(*a, **o)) or reaches[-1])
    found = evaluate(function, x, *inputs.arriving(x), **options)
    monkeypatch.setattr(segments, "find_reach", find)
    forward, backward = reaches
    return found, [*forward[..., :2].flatten(0, 1).T.tolist(), (2 - backward[..., 2].flatten()).tolist()]


def test_skipping_chunks_changes_nothing(monkeypatch):
    """One head forgets within a chunk, one remembers all. Results are the same bits with and without the limit."""
    dtype = torch.float16
    x = inputs.random(1, 8 * CHUNK, H=2, dtype=dtype, raw=True)
    x["A_log"] = torch.tensor([8.0, 0.001]).log()
    found, left_out = in_segments(x, monkeypatch)
    fast, slow = ([row[h::2] for row in left_out] for h in (0, 1))
    assert fast == [[1, 1, 1, 2], [2, 2, 2, 2], [1, 1, 1, 1]] and slow == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.fused_gated_delta_rule, x, do, dstate)
    check(found, expected, BARS[dtype], f"reach, {dtype}", floors(expected, do))
    monkeypatch.setattr(segment_reach, "LEAST", -math.inf)
    whole, left_out = in_segments(x, monkeypatch)
    assert not any(left_out[1] + left_out[2]) and all(torch.equal(found[n], whole[n]) for n in whole)


def test_no_state_before_or_after(monkeypatch):
    """The first and the last transition, and the last end state, are then not computed, and may be anything."""
    x = inputs.random(1, 8 * CHUNK, H=1, dtype=torch.float32, raw=True, gate=1e-3)
    expected = evaluate_truth(truth.fused_gated_delta_rule, x | {"initial_state": None}, inputs.arriving(x)[0], None)
    monkeypatch.setattr(cut, "SEGMENT", 2 * CHUNK)
    leaves = {n: y.clone().requires_grad_() for n, y in x.items() if n != "initial_state"}
    o, _ = fused_gated_delta_rule(**leaves)
    o.backward(inputs.arriving(x)[0])
    found = {"o": o.detach()} | {f"d{n}": y.grad for n, y in leaves.items()}
    check(found, {n: expected[n] for n in found}, BARS[torch.float32], "no states")


def test_factors_that_may_grow_are_all_scanned(monkeypatch):
    """With keys or step sizes used as given, factors need not be contractions."""
    x = inputs.random(1, 8 * CHUNK, H=1, dtype=torch.float32)
    x["g"] = torch.full_like(x["g"], -4.0)
    for normalize in (True, False):
        _, left_out = in_segments(inputs.unit_keys(x), monkeypatch, gated_delta_rule, normalize_qk=normalize)
        assert left_out == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
