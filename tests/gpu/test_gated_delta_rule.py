"""The kernels of the gated delta rule on the GPU, at the sizes of training, against the float64 recurrence.

Printed with -s: every error, and how far our kernels, fla's and FlashQLA's (where installed) carry a state.
"""

import functools
import importlib.util
import math
import os
import subprocess
import sys
import time

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_inputs import BARS, BETAS, GATES, KEYS
from delta_rule_truth import check, evaluate, evaluate_truth, floors, relative_error
from nan_buffers import fill_new_buffers_with_nan
from operator_calls import OperatorCalls

from lrnn.kernels import scans
from lrnn.kernels.gated_delta_rule import fused_gated_delta_rule, gated_delta_product, gated_delta_rule
from lrnn.pretrain import bench_kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Keys that repeat, or nearly, add up the rounding of the operands over all tokens: what each dtype may be off on them
# after 200. float32 shows that it is rounding and nothing else.
HARD = {BF16: {"": 2e-1}, FP16: {"": 1e-1, "dbeta": 2e-1}, FP32: {"": 5e-4}}
# Gates and step sizes at their limits do not add up rounding; they get twice the usual bars.
LIMITS = {dtype: {name: 2 * bar for name, bar in bars.items()} for dtype, bars in BARS.items()}


@pytest.fixture
def plain_buffers():
    """For tests of memory and of speed: new buffers are left as they are."""


@pytest.fixture(autouse=True)
def nan_buffers(request, monkeypatch):
    if "plain_buffers" not in request.fixturenames:
        fill_new_buffers_with_nan(monkeypatch)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()


def random(*sizes, **options):
    return inputs.random(*sizes, **{"K": 128, "device": "cuda", "dtype": BF16, **options})


def compare(x, bars, label, ours=gated_delta_rule, true=truth.gated_delta_rule, zero=(), **options):
    """All outputs and gradients of a function and of its truth; `zero` names gradients that are 0 but for rounding."""
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(true, x, do, dstate, **options)
    least = floors(expected, do) | dict.fromkeys(zero, torch.linalg.vector_norm(do.float()).item())
    check(evaluate(ours, x, do, dstate, **options), expected, bars, label, least)


def compare_fused(x, bars, label, **options):
    compare(x, bars, label, fused_gated_delta_rule, truth.fused_gated_delta_rule, **options)


# ---- random inputs


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
    # The gradients of A_log and dt_bias are one number for each head, a sum of either sign: one alone may be near 0.
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
    compare_fused(x, BARS[BF16], "beta below 1", allow_neg_eigval=False)
    # Nothing decays: the rounding of all chunks adds up.
    compare_fused(x | {"a": None, "A_log": None, "dt_bias": None}, LIMITS[BF16], "no gate")


@pytest.mark.parametrize("of", ["output", "state"])
def test_gradient_of_one_result_alone(of):
    x = random(2, 200)
    do, dstate = inputs.arriving(x)
    alone = (do, None) if of == "output" else (None, dstate)
    expected = evaluate_truth(truth.gated_delta_rule, x, *alone, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, *alone, normalize_qk=True)
    check(found, expected, BARS[BF16], f"{of} alone", floors(expected, do))


@pytest.mark.parametrize("n_h", [2, 3, 4])
def test_product(n_h):
    T = 300
    x = random(2, T * n_h)
    x |= {n: x[n].unflatten(1, (T, n_h)) for n in ("k", "v", "beta")} | {n: x[n][:, :T] for n in ("q", "g")}
    do, dstate = inputs.arriving(x)
    do = do[:, :, 0]
    expected = evaluate_truth(truth.gated_delta_product, x, do, dstate, normalize_qk=True)
    check(evaluate(gated_delta_product, x, do, dstate, normalize_qk=True), expected, BARS[BF16], f"{n_h} factors")


def test_long_sequence_in_segments():
    """One long sequence is cut into segments that are scanned side by side."""
    assert scans.count_segments(1, 8192, 1, 128, 128, BF16) > 1, "this length is not cut any more"
    compare_fused(random(1, 8192, H=1, raw=True), BARS[BF16], "segments")
    x = inputs.set_keys(inputs.set_gates(random(1, 8192, H=1, dtype=FP32), "one"), "random")
    compare(x, {"": 1e-4}, "segments without decay, float32", normalize_qk=True)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_does_not_reach_the_end_of_a_segment_changes_nothing(dtype, monkeypatch):
    """Heads that forget within a chunk, a segment, or never: with nothing left out the results are the same bits."""
    x = random(1, 16384, H=3, dtype=dtype, raw=True)
    x["A_log"] = torch.tensor([8.0, 0.2, 1e-4], device="cuda").log()
    do, dstate = inputs.arriving(x)
    reaches, find = [], scans.Scan.find_reach
    monkeypatch.setattr(scans.Scan, "find_reach", lambda *a: reaches.append(find(*a)) or reaches[-1])
    found = evaluate(fused_gated_delta_rule, x, do, dstate)
    first, lost, _ = reaches[0][0].T.tolist()
    chunks = scans.SEGMENT // 64
    assert 0 < first[1] < first[0] == chunks - 1 and first[2] == 0 and lost == [chunks, chunks, 0], reaches[0]
    monkeypatch.setattr(scans, "LEAST", -math.inf)
    whole = evaluate(fused_gated_delta_rule, x, do, dstate)
    assert not reaches[2][:-1, :, :2].any() and all(torch.equal(found[n], whole[n]) for n in whole)


# ---- tracking: beta = 2, no gate


def span_error(state, true, keys):
    """Relative error of the part of the states [H, K, V] that lies in the span of their keys [T, H, K]."""
    errors = []
    for h in range(keys.shape[1]):
        distinct = torch.unique(keys[:, h].double(), dim=0)
        _, sizes, basis = torch.linalg.svd(distinct, full_matrices=False)
        basis = basis[sizes > 1e-3 * sizes[0]]
        errors.append(relative_error(basis @ state[h].double(), basis @ true[h].double()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("beta", [2.0, 1.5, 1.0])
def test_one_key_for_16384_tokens(beta, dtype):
    """Applying the factor T times is S - (1 - (1 - beta)^T) k k^T S; at beta = 2 it is parity."""
    T = 16384
    x = inputs.set_gates(inputs.set_keys(random(1, T, H=4, dtype=dtype), "parity"), "one")
    x = inputs.set_betas(x, str(beta))
    x["v"].zero_()
    with torch.no_grad():
        _, final = gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    k = torch.nn.functional.normalize(x["k"][0, 0].double(), dim=-1)  # [H, K]
    start = x["initial_state"][0].double()
    true = start - (1 - (1 - beta) ** T) * k[:, :, None] * (k[:, None, :] @ start)
    assert relative_error(final[0], true) < 1e-3
    if beta == 2:
        error = span_error(final[0], true, x["k"][0])
        print(f"one key, beta 2, T {T}, {dtype}: tracked component off by {error:.1e}")
        assert error < 1e-3


def fla_final_state(x):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    arguments = {n: x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")}
    return chunk_gated_delta_rule(**arguments, use_qk_l2norm_in_kernel=True, output_final_state=True)[1]


def flash_qla_final_state(x):
    from flash_qla import chunk_gated_delta_rule

    arguments = {n: x[n] for n in ("q", "k", "v", "g", "beta", "initial_state")}
    return chunk_gated_delta_rule(**arguments, use_qk_l2norm_in_kernel=True, output_final_state=True)[1]


def test_tracking_beside_the_peers():
    """A state set once and carried by reflections along a few keys for 4,096 tokens; raw bf16 keys for everybody."""
    kinds, T = ["2 keys", "4 keys", "8 keys", "swaps"], 4096
    rows = [inputs.set_keys(random(1, T, H=4), kind, seed=10 * i) for i, kind in enumerate(kinds)]
    x = {n: torch.cat([row[n] for row in rows]) for n in rows[0]}
    x = inputs.set_betas(inputs.set_gates(x, "one"), "2")
    x["v"].zero_()
    options = {"normalize_qk": True, "output_final_state": True}
    runs = {"lrnn bf16": lambda y: gated_delta_rule(**y, **options)[1]}
    runs["lrnn bf16 split"] = lambda y: gated_delta_rule(**y, **options, precision="split")[1]
    runs["lrnn fp16"] = lambda y: runs["lrnn bf16"](y | {n: y[n].half() for n in "qkv"})
    runs["lrnn fp32"] = lambda y: runs["lrnn bf16"](y | {n: y[n].float() for n in "qkv"})
    for name, package, run in [("fla", "fla", fla_final_state), ("FlashQLA", "flash_qla", flash_qla_final_state)]:
        if importlib.util.find_spec(package):
            runs[name] = run
    with torch.no_grad():
        _, true = truth.gated_delta_rule(**x, **options)
        finals = {name: run(x) for name, run in runs.items()}
    errors = {
        name: [span_error(final[i], true[i], x["k"][i]) for i in range(len(kinds))] for name, final in finals.items()
    }
    print(f"\nrelative error of the tracked part after {T} tokens" + "".join(f"{kind:>11}" for kind in kinds))
    for name, row in errors.items():
        print(f"{name:51}" + "".join(f"{e:11.2e}" for e in row))
    standard, split = errors["lrnn bf16"], errors["lrnn bf16 split"]
    assert all(e <= before for e, before in zip(split, standard, strict=True)), (split, standard)
    assert 1.5 * sum(split) <= sum(standard), (split, standard)
    assert "fla" in errors, "fla is a dependency: the comparison needs it"
    for peer in set(errors) & {"fla", "FlashQLA"}:
        for kind, e, theirs in zip(kinds, errors["lrnn bf16"], errors[peer], strict=True):
            assert 3 * e <= theirs, f"{kind}: {e:.2e}, {peer} {theirs:.2e}"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("documents", [False, True])
def test_split_precision(documents, dtype):
    """All results, on the scans in Gluon (without documents, in 16 bits) and on the plain ones."""
    bounds = torch.tensor([0, 0, 1, 80, 1000, 2048], device="cuda") if documents else None
    x = random(2, 1024, dtype=dtype, states=5 if documents else None, raw=True)
    ours = functools.partial(fused_gated_delta_rule, precision="split")
    compare(x, BARS[dtype], f"split, {dtype}", ours, truth.fused_gated_delta_rule, cu_seqlens=bounds)


# ---- adversarial inputs


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", KEYS)
def test_keys_that_repeat(kind, dtype):
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


def test_vectors_of_no_length():
    """|x| is floored at 1e-6: a zero key neither writes nor erases, and below the floor x^ is linear in x."""
    x = random(2, 100, dtype=FP32)
    x["k"][:, 3], x["q"][:, 5] = 0.0, 0.0
    x["k"][:, 7] *= 1e-8
    short = [3, 5, 7]
    others = [t for t in range(100) if t not in short]
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    # Their gradients are a million times those of the other tokens: compared in one norm, they would hide them.
    for tokens in (short, others):

        def of_tokens(values, tokens=tokens):
            return {n: y[:, tokens] for n, y in values.items() if n not in ("final_state", "dinitial_state")}

        check(of_tokens(found), of_tokens(expected), BARS[FP32], "short vectors" if tokens is short else "the others")


def test_first_gate_has_no_gradient_without_a_state():
    x = random(2, 100, states=0)
    found = evaluate(gated_delta_rule, x, torch.randn_like(x["v"]), normalize_qk=True)
    assert found["dg"][:, 0].abs().max() < 1e-2 * found["dg"].abs().max()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_raw_projections_at_their_limits(dtype):
    """Logits of +-40 (beta of 2 and of 0), raw gates of +-40, and -inf on both: a token that leaves the state alone."""
    x = random(2, 200, raw=True, dtype=dtype)
    x["b"][:, ::4], x["b"][:, 1::4] = 40.0, -40.0
    x["a"][:, ::3], x["a"][:, 1::6] = -40.0, 40.0
    x["a"][:, 10:13] = x["b"][:, 10:13] = -float("inf")
    compare_fused(x, LIMITS[dtype], f"limits, {dtype}")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_all_ones(dtype):
    """Triton compiles arguments that equal 1 in: scale = 1 is one of them."""
    x = {n: torch.ones_like(y) for n, y in random(2, 200, dtype=dtype).items()} | {"g": None}
    # All vectors are parallel: the gradients of q and k are, before the norm's part is taken out of them.
    compare(x, LIMITS[dtype], f"ones, {dtype}", zero=("dq", "dk"), normalize_qk=True, scale=1.0)


def test_rows_of_a_batch_do_not_meet():
    x = random(2, 70)
    do, dstate = inputs.arriving(x)
    for y in (x["q"], x["k"], x["v"], do):
        y[1] *= 1000
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    for i in (0, 1):
        check({n: y[i] for n, y in found.items()}, {n: y[i] for n, y in expected.items()}, BARS[BF16], f"row {i}")


# ---- documents


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_documents(dtype):
    """Empty ones and ones of one token, in a batch whose rows they cross; a state and its gradient for each."""
    bounds = torch.tensor([0, 0, 1, 16, 80, 145, 145, 464, 465, 465, 1000, 2000, 2000], device="cuda")
    for index_dtype in (torch.int32, torch.int64):
        x = random(2, 1000, dtype=dtype, states=len(bounds) - 1, raw=True)
        compare_fused(x, BARS[dtype], f"documents, {dtype}", cu_seqlens=bounds.to(index_dtype))


def test_a_thousand_short_documents():
    lengths = torch.randint(0, 40, (1000,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().cuda()
    x = random(1, int(bounds[-1]), H=1, K=64, states=1000, raw=True)
    compare_fused(x, BARS[BF16], "1000 documents", cu_seqlens=bounds)


def test_documents_do_not_meet():
    bounds = torch.tensor([0, 70, 75, 300], dtype=torch.int32, device="cuda")
    x = random(1, 300, states=3)
    do, dstate = inputs.arriving(x)
    for y in (x["q"], x["k"], x["v"], do):
        y[:, 70:75] *= 1000
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    for i, part in enumerate((slice(0, 70), slice(70, 75), slice(75, 300))):

        def of_document(values, i=i, part=part):
            return {n: y[i] if n in ("final_state", "dinitial_state") else y[:, part] for n, y in values.items()}

        check(of_document(found), of_document(expected), BARS[BF16], f"document {i}")


# ---- generation


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("T", [1, 2, 16])
def test_recurrence_of_short_sequences(T, dtype):
    x = random(3, T, H=2, HV=4, dtype=dtype, raw=True)
    with torch.no_grad(), OperatorCalls() as calls:
        o, final = fused_gated_delta_rule(**x, output_final_state=True)
    assert list(calls.made) == ["lrnn::gated_delta_rule_recurrent"]
    o_true, final_true = truth.fused_gated_delta_rule(**x, output_final_state=True)
    assert relative_error(o, o_true) < BARS[dtype][""] and relative_error(final, final_true) < 1e-4


def test_generation_continues_the_sequence():
    x = random(2, 150, dtype=FP32)
    o_true, final_true = truth.gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    state, outputs = x.pop("initial_state"), []
    with torch.no_grad():
        for a, b in [(0, 130), *((t, t + 1) for t in range(130, 150))]:
            part = {n: y[:, a:b] for n, y in x.items()}
            o, state = gated_delta_rule(**part, normalize_qk=True, initial_state=state, output_final_state=True)
            outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), o_true) < 1e-4 and relative_error(state, final_true) < 1e-4


# ---- how it behaves as an operator


def test_projections_may_be_slices():
    """q, k and v as views of one projection, gates of another: the same bits as from tensors of their own."""
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
    for _ in range(99):
        again = evaluate(fused_gated_delta_rule, x, *arriving)
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_without_gradients_the_output_is_the_same():
    x = random(2, 130, raw=True)
    with torch.no_grad():
        o, final = fused_gated_delta_rule(**x, output_final_state=True)
    found = evaluate(fused_gated_delta_rule, x, *inputs.arriving(x))
    assert torch.equal(o, found["o"]) and torch.equal(final, found["final_state"])


@pytest.mark.parametrize("documents", [False, True])
def test_torch_compile(documents, plain_buffers):
    """Forward and backward without a graph break, also where the length changes."""
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


def test_operators_keep_the_rules(plain_buffers):
    x = random(2, 16, raw=True)
    bounds = torch.tensor([0, 5, 32], device="cuda")
    for options in ({}, {"cu_seqlens": bounds}):
        with OperatorCalls() as calls:
            evaluate(fused_gated_delta_rule, x, *inputs.arriving(x), **options)
            with torch.no_grad():
                fused_gated_delta_rule(**x, **options)
        assert set(calls.made) == {f"lrnn::gated_delta_rule_{part}" for part in ("forward", "backward", "recurrent")}
        calls.opcheck()


# ---- size, memory, compilation


def test_more_than_2_to_the_31_elements(plain_buffers):
    """Offsets beyond int32, and more programs than a grid's second axis holds: the last rows against the truth."""
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
    with bench_kernels.fla_guard_lifted():
        for name, run in (("lrnn", bench_kernels.ours), ("fla", bench_kernels.fla)):
            peaks[name] = bench_kernels.peak_memory(bench_kernels.passes(run, x)[1])
    print("peak memory of forward and backward, MiB: " + ", ".join(f"{n} {p:.0f}" for n, p in peaks.items()))
    assert peaks["lrnn"] <= peaks["fla"]


def test_first_use_compiles_in_a_minute(tmp_path, plain_buffers):
    """Training, packed documents and generation in a new process with an empty cache."""
    code = """if True:
        import torch
        from lrnn.kernels.gated_delta_rule import fused_gated_delta_rule
        from lrnn.pretrain.bench_kernels import make_inputs
        import time
        start = time.perf_counter()
        x = {n: y.requires_grad_() for n, y in make_inputs(2, 512, 4, 128).items()}
        for bounds in (None, torch.tensor([0, 100, 1024], device="cuda")):
            fused_gated_delta_rule(**x, cu_seqlens=bounds)[0].sum().backward()
        long = {n: y.requires_grad_() for n, y in make_inputs(1, 16384, 1, 128).items()}
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
