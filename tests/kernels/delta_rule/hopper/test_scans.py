"""Test the scans in Gluon, run on the CPU, against the recurrence token by token and autograd, in float64.

LRNN_TORTURE=1 runs each form of the scan that saves states in three orders instead of one (`make torture`).
"""

import itertools
import os

import chunk_equations as equations
import pytest
import torch
from chunk_equations import D, check, make_scan, nans, normal, recurrence, recurrence_inputs, state_rows
from delta_rule_calls import BackendCall
from delta_rule_truth import fused_gated_delta_rule
from gluon_on_cpu import Deadlock

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule.hopper import chunk_forward, scan_backward
from lrnn.kernels.delta_rule.hopper.backend import Hopper

BARS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
torture = pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="another order: make torture")


def in_halves(halves, monkeypatch):
    """Make a program compute both halves of the values, as if heads filled the GPU, or one half."""
    monkeypatch.setattr(chunk_forward, "FULL", 1 if halves == 2 else 1000)


def test_settings_choose_the_halves():
    for full, halves in ((True, 2), (False, 1)):
        assert halves == chunk_forward.hopper_settings(full, True, False, False).HALVES
        assert halves == scan_backward.hopper_backward_settings(full, True).HALVES


def all_of_head(x, head):
    return {name: y[:, :, head:][:, :, :1] if y.shape[2] > 1 else y for name, y in x.items()}


def forward(x, normalize, initial, split=False):
    B, _, HV = x["beta"].shape
    scan = make_scan(x, normalize, split)
    found = {"o": nans(*x["v"].shape, dtype=x["v"].dtype), "final": nans(B, HV, D, D)}
    scan.forward_scan(initial, found["final"], o=found["o"])
    return scan, found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("chunks", "H", "HV", "normalize", "has_initial"),
    [(1, 1, 1, True, False), (4, 1, 2, True, True), (3, 2, 2, False, True)],
)
def test_forward_is_the_recurrence(chunks, H, HV, normalize, has_initial, halves, seed, run_on_cpu, monkeypatch):
    run_on_cpu(seed=seed)
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(1, chunks * CHUNK, H, HV, normalize, seed)
    initial = normal(1, HV, D, D, seed=5) if has_initial else None
    o, _, _, final = recurrence(x, torch.zeros(1, HV, D, D) if initial is None else initial, normalize)
    scan, found = forward(x, normalize, initial)
    check(found, {"o": o, "final": final})
    if normalize:  # for the backward pass
        check({"log_rq": scan.vectors.view(HV, 4, -1)[:, 3]}, {"log_rq": equations.log_norms(x["q"], HV)})


@pytest.mark.parametrize("halves", [1, 2])
def test_second_forward_scan_saves_the_states(halves, run_on_cpu, monkeypatch):
    run_on_cpu()
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(2, 3 * CHUNK, 1, 1, True, seed=1)
    initial = normal(2, 1, D, D, seed=6)
    _, errors, starts, _ = recurrence(x, initial, True)
    found = {"y": nans(2 * 3 * CHUNK, D), "states": nans(2 * 3 * D, D)}
    make_scan(x, True).forward_scan(initial, None, **found)
    check(found, {"y": errors, "states": state_rows(starts)})


def forward_saving(x, initial, split=False):
    """Run one scan that writes the output and also saves states and Y."""
    B, T, HV = x["beta"].shape
    dtype = x["v"].dtype
    found = {"o": nans(B, T, HV, D, dtype=dtype), "final": nans(B, HV, D, D)}
    found |= {"y": nans(B * T, HV * D, dtype=dtype), "states": nans(B * T // CHUNK * HV * D, D, dtype=dtype)}
    scan = make_scan(x, True, split)
    scan.forward_scan(initial, **found)
    return scan, found


# The seeds take turns, so that each occurs with every value of the others.
SAVING = [
    pytest.param(*form, seed, marks=() if seed == (n + n // 6) % 3 else torture)
    for n, form in enumerate(itertools.product([False, True], BARS, [1, 2]))
    for seed in range(3)
]


@pytest.mark.parametrize(("split", "dtype", "halves", "seed"), SAVING, ids=str)
def test_forward_that_saves_equals_both_scans(split, dtype, halves, seed, run_on_cpu, monkeypatch):
    run_on_cpu(seed=seed)
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(1, 4 * CHUNK, 1, 2, True, seed=seed, dtype=dtype)
    initial = normal(1, 2, D, D, seed=6)
    saving, found = forward_saving(x, initial, split)
    scan, expected = forward(x, True, initial, split)
    expected |= {name: torch.empty_like(found[name]) for name in ("y", "states")}
    scan.forward_scan(initial, None, y=expected["y"], states=expected["states"])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(saving.vectors, scan.vectors)


@pytest.mark.parametrize("halves", [1, 2])
def test_forward_gives_the_transition(halves, run_on_cpu, monkeypatch):
    """The scan gives an end state too. The second head's state begins with the second chunk and needs no transition."""
    run_on_cpu()
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(1, 3 * CHUNK, 1, 2, True, seed=2)
    late = {name: y[:, CHUNK:, -1:] for name, y in x.items()}
    ends = [recurrence(part, torch.zeros(1, 1, D, D), True)[3] for part in (all_of_head(x, 0), late)]
    no_values = all_of_head(x, 0) | {"v": torch.zeros(1, 3 * CHUNK, 1, D)}
    transition = recurrence(no_values, torch.eye(D)[None, None], True)[3]
    found = {"ends": nans(1, 2, D, 2 * D)}
    reach = torch.tensor([[[0, 0, -1], [1, 3, -1]]], dtype=torch.int32)
    make_scan(x, True).forward_scan(None, found["ends"], reach=reach)
    rows = torch.cat([transition, torch.zeros_like(transition)], 1)
    check(found, {"ends": torch.cat([torch.cat(ends, 1), rows], -1)})


@pytest.mark.parametrize("seed", range(2))
def test_forward_from_raw_projections(seed, run_on_cpu):
    """C, gates, step sizes and norms come from `chunk_inverse`."""
    run_on_cpu(seed=seed)
    B, T, H, HV = 2, 2 * CHUNK, 1, 2
    q, k, v = normal(B, T, H, D, seed=1), normal(B, T, H, D, seed=2), normal(B, T, HV, D, seed=3)
    a, b, A_log, dt_bias = (normal(*shape, seed=4) for shape in ((B, T, HV), (B, T, HV), (HV,), (HV,)))
    options = {"scale": equations.SCALE, "normalize_qk": True, "gate": "raw", "beta_range": 2.0}
    scan = BackendCall(Hopper, q, k, v, nans(B * T, HV * CHUNK), nans(4 * HV, B * T), **options)
    scan.chunk_inverse(a, b, A_log - 4, dt_bias)
    found = {"o": nans(B, T, HV, D), "final": nans(B, HV, D, D)}
    scan.forward_scan(None, found["final"], o=found["o"])
    o, final = fused_gated_delta_rule(q, k, v, a, b, A_log - 4, dt_bias, output_final_state=True)
    check(found, {"o": o, "final": final})


def backward_scan(x, normalize, initial, split=False):
    """Return the results of the kernel, and the truth."""
    B, T, HV = x["beta"].shape
    dtype, dfinal = x["v"].dtype, normal(B, HV, D, D, seed=6)
    x = x | {"beta": x["beta"].clone()}
    x["beta"][:, 5::40] = (
        0.01 if dtype == torch.float16 else 1e-25
    )  # so small that dW is kept instead of the gradient of v
    do = normal(*x["v"].shape, seed=7).to(dtype)
    scan = make_scan(x, normalize, split)
    if normalize:
        scan.vectors.view(HV, 4, -1)[:, 3] = equations.log_norms(x["q"], HV)  # as the forward scan writes it
    found = {"dv": nans(B, T, HV, D, dtype=dtype), "dstates": nans(B * T // CHUNK * HV * D, D, dtype=dtype)}
    found["dinitial"] = nans(B, HV, D, D)
    scan.backward_scan(do, dfinal, **found)
    return found, equations.scan_gradients(x, initial, do, dfinal, normalize)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("chunks", "H", "HV", "normalize"), [(1, 1, 1, True), (4, 1, 2, True), (3, 2, 2, False)])
def test_backward_scan_agrees_with_autograd(chunks, H, HV, normalize, halves, seed, run_on_cpu, monkeypatch):
    run_on_cpu(seed=seed)
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(1, chunks * CHUNK, H, HV, normalize, seed)
    check(*backward_scan(x, normalize, normal(1, HV, D, D, seed=5)))


@pytest.mark.parametrize("halves", [1, 2])
def test_backward_scan_of_the_first_chunks(halves, run_on_cpu, monkeypatch):
    """Scan no chunk of one head and two of the other. Other chunks then do not affect the first state's gradient."""
    run_on_cpu()
    in_halves(halves, monkeypatch)
    x = recurrence_inputs(1, 3 * CHUNK, 1, 2, True, seed=4)
    do, zero = normal(1, 3 * CHUNK, 2, D, seed=7), torch.zeros(1, 1, D, D)
    scan = make_scan(x, True)
    scan.vectors.view(2, 4, -1)[:, 3] = equations.log_norms(x["q"], 2)
    found = {"dinitial": nans(1, 2, D, D)}
    reach = torch.tensor([[[-1, -1, 0], [-1, -1, 2]]], dtype=torch.int32)
    scan.backward_scan(do, None, **found, reach=reach)
    early = {name: y[:, : 2 * CHUNK] for name, y in all_of_head(x, 1).items()}
    expected = equations.scan_gradients(early, zero, do[:, : 2 * CHUNK, 1:], zero)["dinitial"]
    check(found, {"dinitial": torch.cat([zero, expected], 1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_scans_in_16_bits(split, dtype, run_on_cpu):
    run_on_cpu()
    x = recurrence_inputs(1, 2 * CHUNK, 1, 1, True, seed=3, dtype=dtype)
    initial = normal(1, 1, D, D, seed=8)
    o, errors, starts, final = recurrence(x, initial, True)
    scan, found = forward(x, True, initial, split)
    check(found, {"o": o, "final": final}, BARS[dtype])
    found = {"y": nans(2 * CHUNK, D, dtype=dtype), "states": nans(2 * D, D, dtype=dtype)}
    scan.forward_scan(initial, None, **found)
    check(found, {"y": errors, "states": state_rows(starts)}, BARS[dtype])
    check(*backward_scan(x, True, initial, split), BARS[dtype])


WRONG = {
    "a slot that is not released": (
        "        barriers.p_free.arrive(i)\n", "", Deadlock, "_prepare waits for the end of a phase",
    ),
    "no fence": (
        "shared.p.index(slot).store(p.to(shared.p.dtype))\n            fence_async_shared()",
        "shared.p.index(slot).store(p.to(shared.p.dtype))", AssertionError, "without a fence",
    ),
    "no wait before the place of a result is free": (
        "            if not SAVE_STATES:\n                tma.store_wait(0)\n", "            if not SAVE_STATES:\n",
        AssertionError, "may still",
    ),
    "values released before they are read": (
        "        b_v = shared.v.index(const.HALVES * s + half).permute((1, 0)).load(tile).to(gl.float32)\n"
        "        barriers.early.arrive(i)\n",
        "        barriers.early.arrive(i)\n"
        "        b_v = shared.v.index(const.HALVES * s + half).permute((1, 0)).load(tile).to(gl.float32)\n",
        AssertionError, "read before it is there",
    ),
    "keys loaded as early as values": (
        "        barriers.free.wait_for_previous(i)\n", "", AssertionError, "may still",
    ),
    "another decay to the end": ("gl.exp2(g_last - g + log_rk)", "gl.exp2(g_last + log_rk)", AssertionError, "final"),
}  # fmt: skip
WRONG_SAVING = {
    "no wait before the place of a state is free": (
        "            tma.store_wait(2 if OUTPUT else 0)\n", "", AssertionError, "may still",
    ),
    "a wait for other stores than the state's": (
        "store_wait(2 if OUTPUT", "store_wait(3 if OUTPUT", AssertionError, "may still",
    ),
    "no wait before the places of O and Y are free": (
        "            tma.store_wait(1)  # the last O", "            # the last O", AssertionError, "may still",
    ),
    "a wait for other stores than those of O and Y": ("store_wait(1)", "store_wait(2)", AssertionError, "may still"),
    "no fence": (
        "            fence_async_shared()\n            part_barrier()\n        if OUTPUT:\n",
        "            part_barrier()\n        if OUTPUT:\n", AssertionError, "without a fence",
    ),
    "another state": ("store(b_sh)", "store((2 * b_s).to(dtype))", AssertionError, "states"),
    "another sign of Y": ("b_kept.to(dtype)", "(-b_kept).to(dtype)", AssertionError, "y"),
}  # fmt: skip
WRONG_BACKWARD = {
    "no wait for what is prepared": (
        "        barriers.p_ready.wait(i)\n", "", AssertionError, "before it is there|dv",
    ),
    "no wait for a product": (
        "warpgroup_mma_wait(1, [b_dn])", "warpgroup_mma_wait(2, [b_dn])", AssertionError, "before it was waited for",
    ),
    "queries released before their product is there": (
        "        b_dn, b_ds = warpgroup_mma_wait(0, [b_dn, b_ds])\n        barriers.early.arrive(i)\n",
        "        barriers.early.arrive(i)\n        b_dn, b_ds = warpgroup_mma_wait(0, [b_dn, b_ds])\n",
        AssertionError, "may still",
    ),
    "keys loaded as early as queries": (
        "        barriers.free.wait_for_previous(i)\n        tma_load(k", "        tma_load(k",
        AssertionError, "may still",
    ),
    "a wrong sign": ("store(-gl.exp2(g + log_rk)", "store(gl.exp2(g + log_rk)", AssertionError, "dstates"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_BACKWARD])
def test_mistakes_are_detected(wrong, run_on_cpu):
    old, new, error, message = (WRONG | WRONG_BACKWARD)[wrong]
    x = recurrence_inputs(1, 4 * CHUNK, 1, 1, True)
    o, _, _, final = recurrence(x, torch.zeros(1, 1, D, D), True)
    with pytest.raises(error, match=message):
        for seed in range(8):  # a race appears only in some orders
            run_on_cpu(seed=seed, changes=[(old, new)])
            if wrong in WRONG:
                check(forward(x, True, None)[1], {"o": o, "final": final})
            else:
                check(*backward_scan(x, True, normal(1, 1, D, D, seed=5)))


@pytest.mark.parametrize("wrong", WRONG_SAVING)
def test_mistakes_in_saving_are_detected(wrong, run_on_cpu):
    old, new, error, message = WRONG_SAVING[wrong]
    x = recurrence_inputs(1, 4 * CHUNK, 1, 1, True)
    o, errors, starts, final = recurrence(x, torch.zeros(1, 1, D, D), True)
    expected = {"o": o, "final": final, "y": errors, "states": state_rows(starts)}
    run_on_cpu()
    check(forward_saving(x, None)[1], expected)
    with pytest.raises(error, match=message):
        for seed in range(8):
            run_on_cpu(seed=seed, changes=[(old, new)])
            check(forward_saving(x, None)[1], expected)
