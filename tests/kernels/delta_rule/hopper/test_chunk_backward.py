"""Test `chunk_backward` in Gluon, run on the CPU, against its equations in float64."""

import threading

import pytest
import torch
from chunk_equations import D, check, chunk_gradients, inside_chunks, nans
from gluon_on_cpu import Deadlock


def chunk_backward(scan, given):
    results = {name: nans(1, scan.call.T, scan.call.HV, D, dtype=scan.call.dtype) for name in ("dq", "dk")}
    results |= {name: nans(scan.call.HV, scan.call.R) for name in ("dbeta", "dot_q", "dot_k")}
    given = given | {"dv": given["dv"].clone()}  # finished in place
    scan.chunk_backward(**given, **results)
    return results | {"dv": given["dv"]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("chunks", "H", "HV", "normalize", "programs"),
    [(1, 1, 1, True, 1), (3, 1, 2, True, 1), (4, 2, 4, False, 1), (5, 1, 1, True, 2), (3, 2, 2, False, 4)],
)
def test_chunk_backward(chunks, H, HV, normalize, programs, seed, run_on_cpu):
    """A program processes up to 16 chunks and heads in turn, with 9 tiles each, through a ring of 13 tiles."""
    run_on_cpu(programs, seed)
    scan, given = inside_chunks(chunks, H, HV, normalize, seed)
    check(chunk_backward(scan, given), chunk_gradients(scan, given, normalize))


@pytest.mark.parametrize("seed", range(3, 11))
def test_chunk_backward_in_any_order(seed, run_on_cpu):
    run_on_cpu(1, seed)
    scan, given = inside_chunks(4, 1, 1, True)
    check(chunk_backward(scan, given), chunk_gradients(scan, given, True))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)], ids=str)
def test_chunk_backward_in_16_bits(dtype, bar, run_on_cpu):
    run_on_cpu(2)
    scan, given = inside_chunks(2, 1, 2, True, dtype=dtype)
    check(chunk_backward(scan, given), chunk_gradients(scan, given, True), bar)


WRONG = {
    "no release": ("        ring.release(i, DO, 2)\n", "", Deadlock, "waits for the end of a phase"),
    "no release before the keys": (
        "        ring.release(i, Y)\n        b_k = k_tile.load(wide)", "        b_k = k_tile.load(wide)",
        Deadlock, r"_load_tiles waits for the end of a phase",
    ),
    "no wait before the place of a result is free": (
        "        tma.store_wait(0)\n        place", "        place", AssertionError, "may still",
    ),
    "one arrival too many": (
        "ring.release(i, DX, 2)", "ring.release(i, DX, 3)", AssertionError, "more arrivals",
    ),
    "released before it was read": (
        "        y = ring.when_loaded(i, Y)\n        dx =",
        "        y = ring.when_loaded(i, Y)\n        ring.release(i, Y)\n        dx =",
        AssertionError, "may still",
    ),
    "other bytes expected": ("ROWS * vector_rows.block_type", "4 * vector_rows.block_type", Deadlock, "bytes missing"),
    "no fence": (
        "        fence_async_shared()\n        part_barrier()\n        tma_store(to_dk", "        tma_store(to_dk",
        AssertionError, "without a fence",
    ),
    "no wait for a product": (
        "b_dp = warpgroup_mma_wait(2, [b_dp])", "b_dp = warpgroup_mma_wait(3, [b_dp])", AssertionError,
        "before it was waited for",
    ),
    "no wait for the other part": (
        "        mbarrier.wait(between.dp_ready, i & 1)\n", "", AssertionError, "before it is there|dk",
    ),
    "dv of small step sizes left as it is": ("gl.min(beta_tile", "gl.max(beta_tile", AssertionError, "dv"),
    "another mask": ("mask = rows[:, None] > columns", "mask = rows[:, None] >= columns", AssertionError, "dk"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_detected(wrong, run_on_cpu):
    old, new, error, message = WRONG[wrong]
    run_on_cpu()
    scan, given = inside_chunks(4, 1, 1, False)  # with normalised keys a wrong diagonal would not change dk
    truth = chunk_gradients(scan, given, False)
    with pytest.raises(error, match=message):
        for seed in range(8):  # a race appears only in some orders
            run_on_cpu(1, seed, [(old, new)])
            check(chunk_backward(scan, given), truth)
    assert not [t for t in threading.enumerate() if t.name.startswith("part ")]
