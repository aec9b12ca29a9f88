"""Test the behaviour as an operator of PyTorch: sizes, memory and compilation."""

import os
import subprocess
import sys
import time

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_inputs import BARS
from delta_rule_on_gpu import BF16, FP32, random
from delta_rule_truth import check, evaluate, floors, relative_error
from operator_calls import OperatorCalls

from lrnn.bench import kernels as bench_kernels
from lrnn.bench import peers
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule


def test_projections_may_be_slices():
    """With q, k and v as views of one projection and gates as views of another, results are the same bits."""
    x = random(2, 130, raw=True)
    joined = torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], -1)
    gates = torch.cat([x["a"], x["b"]], -1)
    views = dict(zip(("q", "k", "v"), (y.unflatten(-1, (2, 128)) for y in joined.chunk(3, -1)), strict=True))
    views |= dict(zip(("a", "b"), gates.chunk(2, -1), strict=True))
    views = x | views
    assert not any(views[n].is_contiguous() for n in ("q", "k", "v", "a", "b"))
    with torch.no_grad():
        assert torch.equal(fused_gated_delta_rule(**views)[0], fused_gated_delta_rule(**x)[0])


@pytest.mark.parametrize(("B", "T", "H"), [(2, 1000, 16), (1, 16384, 2)])
def test_a_hundred_runs_are_bitwise_equal(B, T, H):
    x = random(B, T, H=H, raw=True)
    arriving = inputs.arriving(x)
    first = evaluate(fused_gated_delta_rule, x, *arriving)
    for run in range(99):
        again = evaluate(fused_gated_delta_rule, x, *arriving)
        other = {n: (first[n] != again[n]).nonzero()[:, :3].tolist() for n in first}
        assert not any(other.values()), f"run {run}: " + "; ".join(f"{n} {len(x)} {x[:4]}" for n, x in other.items())


@pytest.mark.parametrize("precision", ["standard", "split"])
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "dtype"),
    [
        (2, 512, 4, 128, BF16),  # in Gluon: one program per half of the values, both halves in one, with segments
        (8, 512, 16, 128, BF16),
        (1, 8192, 4, 128, BF16),
        (2, 500, 4, 128, BF16),  # in plain Triton
        (2, 512, 4, 64, FP32),
    ],
)
def test_saved_states_equal_recomputed_ones(B, T, H, K, dtype, precision):
    x = random(B, T, H=H, K=K, dtype=dtype, raw=True)
    arriving = inputs.arriving(x)
    recomputed, saved = (
        evaluate(fused_gated_delta_rule, x, *arriving, precision=precision, save_states=s) for s in (False, True)
    )
    assert all(torch.equal(recomputed[n], saved[n]) for n in recomputed)


def test_saved_states_take_the_expected_memory(plain_buffers):
    x = bench_kernels.make_inputs(4, 2048, 16, 128)
    kept = {}
    for run in (bench_kernels.ours, bench_kernels.ours_saved):
        forward, _ = bench_kernels.passes(run, x)
        forward()
        before = torch.cuda.memory_allocated()
        o = forward()
        kept[run] = torch.cuda.memory_allocated() - before
        del o
    more = kept[bench_kernels.ours_saved] - kept[bench_kernels.ours]
    assert abs(more - 768 * 4 * 2048 * 16) < 2**20


def test_without_gradients_the_output_is_the_same():
    x = random(2, 130, raw=True)
    with torch.no_grad():
        o, final = fused_gated_delta_rule(**x, output_final_state=True)
    found = evaluate(fused_gated_delta_rule, x, *inputs.arriving(x))
    assert torch.equal(o, found["o"]) and torch.equal(final, found["final_state"])


@pytest.mark.parametrize("documents", [False, True])
def test_torch_compile(documents, plain_buffers):
    """Compile both passes without a graph break, also if the length changes."""
    torch._dynamo.reset()
    compiled = torch.compile(fused_gated_delta_rule, fullgraph=True)
    for T in (130, 200):
        bounds = torch.tensor([0, 50, 2 * T], device="cuda") if documents else None
        x = random(2, T, raw=True)
        found = evaluate(compiled, x, *inputs.arriving(x), cu_seqlens=bounds)
        eager = evaluate(fused_gated_delta_rule, x, *inputs.arriving(x), cu_seqlens=bounds)
        for name in eager:
            assert relative_error(found[name], eager[name]) < 1e-6, (T, name)


def test_autocast_changes_nothing():
    x = random(2, 130, raw=True)
    arriving = inputs.arriving(x)
    plain = evaluate(fused_gated_delta_rule, x, *arriving)
    with torch.autocast("cuda", BF16):
        cast = evaluate(fused_gated_delta_rule, x, *arriving)
    for name in plain:
        assert cast[name].dtype == plain[name].dtype and torch.equal(cast[name], plain[name]), name
    assert plain["o"].dtype == BF16 and plain["final_state"].dtype == plain["dA_log"].dtype == FP32


def test_operators_pass_opcheck(plain_buffers):
    x = random(2, 16, raw=True)
    bounds = torch.tensor([0, 5, 32], device="cuda")
    for options in ({}, {"cu_seqlens": bounds}):
        with OperatorCalls() as calls:
            evaluate(fused_gated_delta_rule, x, *inputs.arriving(x), **options)
            with torch.no_grad():
                fused_gated_delta_rule(**x, **options)
        assert set(calls.made) == {f"lrnn::gated_delta_rule_{part}" for part in ("forward", "backward", "recurrent")}
        calls.opcheck()


def test_more_than_2_to_the_31_elements(plain_buffers):
    """Compare the last rows with the truth, at offsets beyond int32 and beyond the programs of a grid's second axis."""
    B, T, H, K = 8208, 128, 16, 128
    assert B * T * H * K > 2**31 and B * H > 2**16
    r = inputs.generator("cuda", 0)
    x = {n: torch.empty(B, T, H, K, device="cuda", dtype=BF16).normal_(generator=r) for n in ("q", "k", "v")}
    x |= {n: torch.empty(B, T, H, device="cuda", dtype=BF16).normal_(generator=r) for n in ("a", "b")}
    x |= {n: torch.randn(H, generator=r, device="cuda") - 2 for n in ("A_log", "dt_bias")}
    last = {n: y[-1:].clone() if y.ndim > 1 else y for n, y in x.items()}
    do = torch.empty(1, T, H, K, device="cuda", dtype=BF16).normal_(generator=r)
    for y in x.values():
        y.requires_grad_()
    o, _ = fused_gated_delta_rule(**x)
    names = ("q", "k", "v", "a", "b")
    gradients = torch.autograd.grad(o, [x[n] for n in names], do.expand(B, T, H, K))
    found = {"o": o.detach()[-1:]} | {f"d{n}": dx[-1:] for n, dx in zip(names, gradients, strict=True)}
    leaves = {n: y.double().requires_grad_() for n, y in last.items()}
    o_true, _ = truth.fused_gated_delta_rule(**leaves)
    true = torch.autograd.grad(o_true, [leaves[n] for n in names], do.double())
    expected = {"o": o_true.detach()} | {f"d{n}": dx for n, dx in zip(names, true, strict=True)}
    check(found, expected, BARS[BF16], f"{B * T * H * K:.3g} elements", floors(expected, do))


def test_peak_memory_is_no_more_than_flas(plain_buffers):
    x = bench_kernels.make_inputs(8, 4096, 16, 128)
    peaks = {}
    with peers.fla_guard_lifted():
        for name, run in (("lrnn", bench_kernels.ours), ("fla", peers.fla)):
            peaks[name] = bench_kernels.peak_memory(bench_kernels.passes(run, x)[1])
    print("peak memory of forward and backward, MiB: " + ", ".join(f"{n} {p:.0f}" for n, p in peaks.items()))
    assert peaks["lrnn"] <= peaks["fla"]


def test_first_use_compiles_in_a_minute(tmp_path, plain_buffers):
    """Train, use packed documents and generate in a new process with an empty cache.

    This runs the delta rule, the short convolution and the gated norm.
    """
    code = """if True:
        import torch
        from lrnn.kernels.delta_rule.api import fused_gated_delta_rule
        from lrnn.kernels.gated_rms_norm import gated_rms_norm
        from lrnn.kernels.short_conv.api import short_conv
        from lrnn.bench.kernels import make_inputs
        import time
        def leaf(*shape):
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        start = time.perf_counter()
        x = {n: y.requires_grad_() for n, y in make_inputs(2, 512, 4, 128).items()}
        for bounds in (None, torch.tensor([0, 100, 1024], device="cuda")):
            fused_gated_delta_rule(**x, cu_seqlens=bounds)[0].sum().backward()
            xs, weights = [leaf(2, 512, 512) for _ in range(3)], [leaf(512, 1, 4) for _ in range(3)]
            sum(y.sum() for y in short_conv(xs, weights, cu_seqlens=bounds)).backward()
        gated_rms_norm(leaf(2, 512, 4, 128), leaf(2, 512, 4, 128), leaf(128), 1e-5).sum().backward()
        long = {n: y.requires_grad_() for n, y in make_inputs(1, 16384, 4, 128).items()}
        fused_gated_delta_rule(**long)[0].sum().backward()
        with torch.no_grad():
            fused_gated_delta_rule(**make_inputs(2, 1, 4, 128))
        torch.cuda.synchronize()
        print(time.perf_counter() - start)
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(f"first use: {float(result.stdout.split()[-1]):.1f} s, with imports {time.perf_counter() - start:.1f} s")
    assert float(result.stdout.split()[-1]) < 60
