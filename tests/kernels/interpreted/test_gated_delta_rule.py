"""Test the Triton kernels of the gated delta rule against the float64 recurrence, at sizes for the interpreter."""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_compare import compare, compare_short_vectors
from delta_rule_inputs import BARS, BETAS, GATES, KEYS
from delta_rule_truth import check, evaluate, evaluate_truth, relative_error
from operator_calls import OperatorCalls

from lrnn.kernels.delta_rule import cut
from lrnn.kernels.delta_rule import operator as delta_rule_op
from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_product, gated_delta_rule
from lrnn.kernels.reference import delta_rule as reference

FP16, FP32 = torch.float16, torch.float32
# If keys (nearly) repeat, the rounding of the operands adds up over all tokens. These are the bounds of float16.
# In float32 rounding is negligible, so float32 tests the equations. float16 tests that nothing breaks.
HARD = {FP16: {"": 2e-2}, FP32: {"": 2e-4}}


# The kernels treat no length differently for a type, so the types take turns, but for one token, and one past a chunk.
@pytest.mark.parametrize(
    ("T", "dtype"),
    [(1, FP16), (1, FP32), (15, FP16), (63, FP32), (64, FP16), (65, FP16), (65, FP32), (127, FP16), (150, FP32)],
)
def test_lengths(T, dtype):
    compare(inputs.random(1, T, dtype=dtype), BARS[dtype], f"T {T}, {dtype}", normalize_qk=True)


def test_rows_of_a_batch_are_independent():
    """If T is no multiple of the chunk, a row's last tile holds tokens of the next row, which are large here."""
    x = inputs.random(2, 70, H=1, dtype=FP16)
    for name in ("q", "k", "v"):
        x[name][1] *= 100
    do, dstate = inputs.arriving(x)
    do[1] *= 100
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    for row in (0, 1):
        check({n: y[row] for n, y in found.items()}, {n: y[row] for n, y in expected.items()}, BARS[FP16], f"row {row}")


@pytest.mark.parametrize(
    ("K", "V", "T", "dtype"), [(128, 128, 70, FP16), (64, 192, 65, FP16), (256, 64, 20, FP16), (256, 64, 20, FP32)]
)
def test_head_sizes(K, V, T, dtype):
    compare(inputs.random(1, T, H=1, K=K, V=V, dtype=dtype), BARS[dtype], f"K {K}, V {V}", normalize_qk=True)


@pytest.mark.parametrize(
    ("K", "V", "T", "dtype"),
    [(32, 32, 70, FP16), (32, 32, 70, FP32), (16, 48, 65, FP32), (96, 16, 65, FP16), (5, 3, 20, FP32)],
)
def test_head_sizes_that_are_padded(K, V, T, dtype):
    """Initial and final states have the unpadded sizes, and the scale is that of the unpadded K."""
    compare(inputs.random(1, T, H=2, K=K, V=V, dtype=dtype), BARS[dtype], f"K {K}, V {V}", normalize_qk=True)


@pytest.mark.parametrize("T", [1, 9])
def test_padded_heads_token_by_token(T):
    x = inputs.random(2, T, K=32, V=150)
    o_true, final_true = truth.gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    with torch.no_grad():
        o, final = gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    assert o.shape == o_true.shape and final.shape == final_true.shape
    assert relative_error(o, o_true) < 1e-4 and relative_error(final, final_true) < 1e-4


def test_padded_heads_of_the_other_functions():
    x = inputs.random(1, 40, K=32, V=32, raw=True)
    compare(x, BARS[FP32], "raw, K 32", fused_gated_delta_rule, truth.fused_gated_delta_rule)
    x = inputs.random(1, 40, K=32, V=32)
    steps = {n: x[n].unflatten(1, (20, 2)) for n in ("k", "v", "beta")}
    x |= steps | {"q": x["q"][:, ::2], "g": x["g"][:, ::2]}
    do = torch.randn(1, 20, 2, 32)
    found = evaluate(gated_delta_product, x, do, normalize_qk=True)
    check(found, evaluate_truth(truth.gated_delta_product, x, do, normalize_qk=True), BARS[FP32], "product, K 32")


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_keys_as_given(dtype):
    """Without normalize_qk the rounded keys are used as they are, and dk has a part along the key."""
    x = inputs.unit_keys(inputs.random(1, 70, H=1, dtype=dtype))
    x["k"] *= 0.9
    compare(x, BARS[dtype], f"keys as given, {dtype}")


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, FP16) for kind in KEYS), *((kind, FP32) for kind in ("parity", "swaps", KEYS[-1]))]
)
def test_repeated_keys(kind, dtype):
    x = inputs.random(1, 100, H=1, dtype=dtype)
    x = inputs.set_betas(inputs.set_gates(inputs.set_keys(x, kind), "none"), "2")
    compare(x, HARD[dtype], f"{kind}, {dtype}", normalize_qk=True)


def test_zero_vectors():
    compare_short_vectors(inputs.random(1, 70, H=1), BARS[FP32])


def test_parity_is_exact():
    """With one key of any length, beta = 2 and no gate, two steps restore the state, and rounding must not add up."""
    x = inputs.random(1, 320, H=1, dtype=FP16)
    x = inputs.set_betas(inputs.set_gates(inputs.set_keys(x, "parity"), "one"), "2")
    x["v"].zero_()
    with torch.no_grad():
        _, final = gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    assert relative_error(final, x["initial_state"]) < 1e-5


@pytest.mark.parametrize("kind", BETAS)
def test_step_sizes(kind):
    dtype = FP32 if kind == "1e-6" else FP16  # float16 has fewer than three digits there, and dv is as small
    T = 130 if kind == "chunk" else 70  # the second chunk has tokens before it and after it
    x = inputs.set_betas(inputs.random(1, T, H=1, dtype=dtype), kind)
    compare(x, HARD[dtype], f"beta {kind}", normalize_qk=True)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e-4])
def test_gradient_of_small_step_sizes(beta):
    """float16 loses beta X of such tokens next to the others'. It must keep X, which the gradient of beta needs."""
    x = inputs.random(1, 70, H=1, K=64, dtype=FP16)
    small = slice(None, None, 2)
    x["beta"][:, small] = beta
    arriving = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_rule, x, *arriving, normalize_qk=True)["dbeta"][:, small]
    found = evaluate(gated_delta_rule, x, *arriving, normalize_qk=True)["dbeta"][:, small]
    assert relative_error(found, expected) < BARS[FP16]["dbeta"]


@pytest.mark.parametrize("kind", GATES)
def test_gates(kind):
    x = inputs.set_gates(inputs.random(1, 100, H=2 if kind == "mixed" else 1, dtype=FP16), kind)
    compare(x, HARD[FP16], f"gates {kind}", normalize_qk=True)


@pytest.mark.parametrize("kind", ["-20", "-80", "once"])
def test_strong_gates_in_float32(kind):
    x = inputs.set_gates(inputs.random(1, 70, H=1), kind)
    compare(x, BARS[FP32], f"gates {kind}, float32", normalize_qk=True)


def test_first_gate_has_no_gradient_without_a_state():
    """There is no state for the first gate to decay."""
    x = inputs.random(1, 70, H=1, states=0)
    found = evaluate(gated_delta_rule, x, torch.randn_like(x["v"]), normalize_qk=True)
    assert found["dg"][:, 0].abs().max() < 1e-5 * found["dg"].abs().max()


def test_all_ones():
    """Triton compiles arguments that equal 1 as constants. scale = 1 is one of them."""
    x = {n: torch.ones_like(y) for n, y in inputs.random(1, 65, H=1, dtype=FP16).items()} | {"g": torch.zeros(1, 65, 1)}
    # All vectors are parallel, and so are the gradients of q and k before the norm's part is taken out of them.
    # beta = 1 overwrites the state, so no gate has a gradient. Only the rounding of terms that cancel remains there.
    compare(x, {"": 2e-3, "dg": 1e-1}, "ones", zero=("dq", "dk", "dg"), normalize_qk=True, scale=1.0)


@pytest.mark.parametrize(("dtype", "index_dtype"), [(FP16, torch.int32), (FP32, torch.int64)])
def test_documents(dtype, index_dtype):
    """Test empty documents and ones of one token, across rows of a batch, each with a state and its gradient."""
    bounds = torch.tensor([0, 0, 1, 16, 80, 145, 145, 180, 180], dtype=index_dtype)
    x = inputs.random(2, 90, H=1, dtype=dtype, states=len(bounds) - 1)
    compare(x, BARS[dtype], f"documents, {dtype}", normalize_qk=True, cu_seqlens=bounds)


def test_documents_are_independent():
    bounds = torch.tensor([0, 70, 75, 140], dtype=torch.int32)
    x = inputs.random(1, 140, H=1, dtype=FP16, states=3)
    do, dstate = inputs.arriving(x)
    large = slice(70, 75)
    for y in (x["q"], x["k"], x["v"], do):
        y[:, large] *= 100
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True, cu_seqlens=bounds)
    for i, part in enumerate((slice(0, 70), large, slice(75, 140))):

        def of_document(values, i=i, part=part):
            return {n: y[i] if n in ("final_state", "dinitial_state") else y[:, part] for n, y in values.items()}

        check(of_document(found), of_document(expected), BARS[FP16], f"document {i}")


def test_documents_of_raw_projections():
    bounds = torch.tensor([0, 1, 1, 70], dtype=torch.int32)
    x = inputs.random(1, 70, H=1, dtype=FP16, states=3, raw=True)
    compare(x, BARS[FP16], "raw", fused_gated_delta_rule, truth.fused_gated_delta_rule, cu_seqlens=bounds)


@pytest.mark.parametrize(("raw", "HV"), [(False, 4), (True, 18)])  # 18 is more than a program of the gates takes
def test_grouped_value_heads(raw, HV):
    x = inputs.random(1, 33 if raw else 65, H=2, HV=HV, dtype=FP16, raw=raw)
    if raw:
        compare(x, BARS[FP16], "grouped, raw", fused_gated_delta_rule, truth.fused_gated_delta_rule)
    else:
        compare(x, BARS[FP16], "grouped", normalize_qk=True)


@pytest.mark.parametrize(
    ("gated", "negative", "dtype"),
    [(True, True, FP16), (True, False, FP32), (False, True, FP32), (False, False, FP16)],
)
def test_raw_projections(gated, negative, dtype):
    x = inputs.random(1, 70, H=2, dtype=dtype, raw=True)
    if not gated:
        x |= {"a": None, "A_log": None, "dt_bias": None}
    functions = fused_gated_delta_rule, truth.fused_gated_delta_rule
    compare(x, BARS[dtype], f"raw, gated {gated}, negative {negative}", *functions, beta_range=2.0 if negative else 1.0)


def test_raw_projections_at_their_limits():
    """Test logits of +-40 (beta of 2 and 0), raw gates of +-40, and -inf for both, which leaves the state unchanged."""
    x = inputs.random(1, 66, H=1, dtype=FP16, raw=True)
    x["b"][:, ::4], x["b"][:, 1::4] = 40.0, -40.0
    x["a"][:, ::3], x["a"][:, 1::6] = -40.0, 40.0
    x["a"][:, 10:13] = x["b"][:, 10:13] = -float("inf")
    compare(x, HARD[FP16], "limits", fused_gated_delta_rule, truth.fused_gated_delta_rule)
    with torch.no_grad():
        whole, _ = fused_gated_delta_rule(**x)
        kept = {n: y[:, [t for t in range(66) if not 10 <= t < 13]] if y.ndim > 2 and n != "initial_state" else y
                for n, y in x.items()}  # fmt: skip
        without, _ = fused_gated_delta_rule(**kept)
    assert relative_error(torch.cat([whole[:, :10], whole[:, 13:]], 1), without.double()) < BARS[FP16][""]


@pytest.mark.parametrize(("n_h", "documents"), [(2, False), (3, True), (4, False)])
def test_product(n_h, documents):
    T = 40
    x = inputs.random(1, T * n_h, H=1, dtype=FP16, states=3 if documents else 1)
    x |= {n: x[n].unflatten(1, (T, n_h)) for n in ("k", "v", "beta")}
    x |= {n: x[n][:, :T].contiguous() for n in ("q", "g")}
    bounds = torch.tensor([0, 1, 1, T], dtype=torch.int32) if documents else None
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_product, x, do[:, :, 0], dstate, normalize_qk=True, cu_seqlens=bounds)
    found = evaluate(gated_delta_product, x, do[:, :, 0], dstate, normalize_qk=True, cu_seqlens=bounds)
    check(found, expected, BARS[FP16], f"{n_h} factors")


@pytest.mark.parametrize("of", ["output", "state"])
def test_gradient_of_one_result_alone(of):
    x = inputs.random(1, 70, H=1, dtype=FP16)
    do, dstate = inputs.arriving(x)
    alone = (do, None) if of == "output" else (None, dstate)
    expected = evaluate_truth(truth.gated_delta_rule, x, *alone, normalize_qk=True)
    check(evaluate(gated_delta_rule, x, *alone, normalize_qk=True), expected, BARS[FP16], f"{of} alone")


@pytest.mark.parametrize(("documents", "dtype"), [(False, FP16), (False, FP32), (True, FP16)])
def test_segments(documents, dtype, monkeypatch):
    """Cut short sequences into segments that are scanned side by side, as long ones are otherwise.

    In float32 there is no decay, so every segment carries the states of all segments before it.
    """
    monkeypatch.setattr(cut, "SEGMENT", 64)
    x = inputs.random(1, 256, H=1, K=64, dtype=dtype, states=2 if documents else 1)
    if dtype == FP32:
        x = inputs.set_gates(x, "one")
    bounds = torch.tensor([0, 100, 256]) if documents else None
    if not documents:
        assert cut.count_segments(1, 256, 1, 64, 64, dtype) == 4
    compare(x, BARS[dtype], f"segments, {dtype}", normalize_qk=True, cu_seqlens=bounds)


def test_projections_may_be_slices():
    """Pass q, k and v as views of one projection [B, T, 3 H K], and gates as views of another."""
    x = inputs.random(2, 66, H=2, dtype=FP16)
    joined = torch.cat([x[n].flatten(2) for n in ("q", "k", "v")], -1)
    gates = torch.stack([x["g"], x["beta"]], -1)
    views = dict(zip(("q", "k", "v"), (y.unflatten(-1, (2, 64)) for y in joined.chunk(3, -1)), strict=True))
    views |= {"g": gates[..., 0], "beta": gates[..., 1], "initial_state": x["initial_state"].mT.contiguous().mT}
    assert not any(y.is_contiguous() for y in views.values())
    with torch.no_grad():
        options = {"normalize_qk": True, "output_final_state": True}
        for found, expected in zip(gated_delta_rule(**views, **options), gated_delta_rule(**x, **options), strict=True):
            assert torch.equal(found, expected)


def test_the_same_again():
    x = inputs.random(1, 70, H=1, dtype=FP16, raw=True)
    first, second = (evaluate(fused_gated_delta_rule, x, *inputs.arriving(x)) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_without_gradients_the_output_is_the_same():
    x = inputs.random(1, 70, H=1, dtype=FP16)
    with torch.no_grad():
        o, final = gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    found = evaluate(gated_delta_rule, x, *inputs.arriving(x), normalize_qk=True)
    assert torch.equal(o, found["o"]) and torch.equal(final, found["final_state"])
    o, final = gated_delta_rule(**x, normalize_qk=True)
    assert final is None


@pytest.mark.parametrize("kind", ["log", "raw"])
@pytest.mark.parametrize(("T", "K", "HV"), [(1, 64, 1), (5, 128, 2), (16, 64, 1)])
def test_recurrence_of_short_sequences(T, K, HV, kind):
    x = inputs.random(2, T, H=1, HV=HV, K=K, dtype=FP16, raw=kind == "raw")
    ours, true = (gated_delta_rule, truth.gated_delta_rule)
    options = {"normalize_qk": True, "output_final_state": True}
    if kind == "raw":
        ours, true = (fused_gated_delta_rule, truth.fused_gated_delta_rule)
        del options["normalize_qk"]
    with torch.no_grad(), OperatorCalls() as calls:
        o, final = ours(**x, **options)
    assert list(calls.made) == ["lrnn::gated_delta_rule_recurrent"]
    o_true, final_true = true(**x, **options)
    assert relative_error(o, o_true) < 5e-4 and relative_error(final, final_true) < 1e-5


def test_recurrence_over_documents_and_without_a_gate():
    x = inputs.set_gates(inputs.random(2, 8, H=1, dtype=FP16, states=4), "none")
    options = {"cu_seqlens": torch.tensor([0, 1, 1, 9, 16], dtype=torch.int32), "output_final_state": True}
    x = inputs.unit_keys(x)
    with torch.no_grad():
        o, final = gated_delta_rule(**x, **options)
    o_true, final_true = truth.gated_delta_rule(**x, **options)
    assert relative_error(o, o_true) < 5e-4 and relative_error(final, final_true) < 1e-5


def test_generation_continues_the_sequence():
    """Computing some tokens by chunks and the rest one at a time equals computing the whole sequence at once."""
    x = inputs.random(1, 70, H=1, dtype=FP32)
    o_true, final_true = truth.gated_delta_rule(**x, normalize_qk=True, output_final_state=True)
    state, outputs = x.pop("initial_state"), []
    with torch.no_grad():
        for a, b in [(0, 65), *((t, t + 1) for t in range(65, 70))]:
            part = {n: y[:, a:b] for n, y in x.items()}
            o, state = gated_delta_rule(**part, normalize_qk=True, initial_state=state, output_final_state=True)
            outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), o_true) < 1e-4 and relative_error(state, final_true) < 1e-4


def test_operators_pass_opcheck():
    x = inputs.random(1, 2, H=1, dtype=FP16, raw=True)
    with OperatorCalls() as calls:
        evaluate(fused_gated_delta_rule, x, *inputs.arriving(x))
        with torch.no_grad():
            fused_gated_delta_rule(**x)
    assert set(calls.made) == {f"lrnn::gated_delta_rule_{part}" for part in ("forward", "backward", "recurrent")}
    calls.opcheck()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(k=x["k"].repeat(1, 1, 1, 5), q=x["q"].repeat(1, 1, 1, 5), initial_state=None), "up to 256"),
        (lambda x: x.update(v=x["v"].repeat(1, 1, 1, 5), initial_state=None), "up to 256"),
        (lambda x: x.update(v=x["v"].float()), "one dtype"),
        (lambda x: x.update({n: x[n].double() for n in "qkv"}), "bfloat16, float16 or float32"),
        (lambda x: x.update(k=x["k"][:, :, :1]), "q and k must"),
        (lambda x: x.update(v=x["v"][:, :, :1].repeat(1, 1, 3, 1)), "multiple"),
        (lambda x: x.update(beta=x["beta"][..., :1]), "beta must"),
        (lambda x: x.update(g=x["g"][:, :4]), "g must"),
        (lambda x: x.update(initial_state=x["initial_state"][:, :1]), "initial_state must"),
        (lambda x: x.update(beta=x["beta"].long()), "beta must be floating-point"),
        (lambda x: x.update(g=x["g"].long()), "g must be floating-point"),
        (lambda x: x.update(initial_state=x["initial_state"].long()), "initial_state must be floating-point"),
        *[
            (lambda x, name=name: x.update({name: x[name].to("meta")}), f"{name} must be on cpu; it is on meta")
            for name in ("k", "v", "g", "beta", "initial_state")
        ],
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 4, 10], device="meta")), "cu_seqlens must be on cpu"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 4, 9])), "cu_seqlens must go from 0 to 10"),
        (lambda x: x.update(cu_seqlens=torch.tensor([1, 4, 10])), "cu_seqlens must go from 0 to 10"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 7, 4, 10])), "cu_seqlens must go from 0 to 10"),
        (lambda x: x.update(scale=-1.0), "scale must be positive"),
        (lambda x: x.update(scale=0.0), "scale must be positive"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0, 1, 2, 10])), "initial_state"),
        (lambda x: x.update(cu_seqlens=torch.tensor([0.0, 10.0]), initial_state=x["initial_state"][:1]), "cu_seqlens"),
        (lambda x: x.update({n: y[:, :0] for n, y in x.items() if n != "initial_state"}), "tokens"),
    ],
)
def test_unsupported_inputs_are_refused(change, message):
    x = inputs.random(2, 5, dtype=FP16)
    change(x)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**x, normalize_qk=True)
    if not any(text in message for text in ("up to 256", "dtype", "float32")):  # the CPU refuses the same inputs
        with pytest.raises(ValueError, match=message):
            reference.gated_delta_rule(**x, normalize_qk=True)


@pytest.mark.parametrize("function", [fused_gated_delta_rule, reference.fused_gated_delta_rule])
@pytest.mark.parametrize("name", ["A_log", "dt_bias"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: None, "go together"),
        (lambda p: p[:1], r"must be \[HV\] = \[2\] and contiguous; got \[1\]"),
        (lambda p: p[None], "must be .* and contiguous"),
        (lambda p: p.repeat_interleave(2)[::2], "must be .* and contiguous"),
        (lambda p: p.long(), "must be floating-point"),
        (lambda p: p.to("meta"), "must be on cpu; it is on meta"),
    ],
)
def test_invalid_parameters_of_a_raw_gate_are_refused(change, message, name, function):
    """The kernels read HV contiguous numbers, and would read past the end of a tensor of the wrong shape."""
    x = inputs.random(1, 5, dtype=FP16, raw=True)
    assert x[name].shape == (2,)
    x[name] = change(x[name])
    with pytest.raises(ValueError, match=message):
        function(**x)


@pytest.mark.parametrize("function", [fused_gated_delta_rule, reference.fused_gated_delta_rule])
def test_errors_name_the_raw_projections(function):
    x = inputs.random(1, 5, dtype=FP16, raw=True)
    with pytest.raises(ValueError, match=r"^a must be"):
        function(**x | {"a": x["a"][:, :4]})
    with pytest.raises(ValueError, match=r"^b must be floating-point"):
        function(**x | {"b": x["b"].long()})


@pytest.mark.parametrize("compiled", [False, True])
def test_the_assembler_is_checked(compiled, monkeypatch):
    """The operators make the check, because Dynamo does not trace them. It would leave it out of a graph."""
    devices = []
    monkeypatch.setattr(delta_rule_op, "check_assembler", devices.append)
    x = inputs.random(1, 17, H=1, dtype=FP16)

    def step(**x):
        return gated_delta_rule(**x, normalize_qk=True)[0]

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    step(**x)
    assert set(devices) == {torch.device("cpu")}


def test_gradients_have_no_gradients():
    x = inputs.random(1, 20, H=1, K=64)
    x["v"].requires_grad_()
    o, _ = gated_delta_rule(**x, normalize_qk=True)
    (dv,) = torch.autograd.grad(o.square().sum(), x["v"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradients of their own"):
        dv.square().sum().backward()


def test_gradient_of_a_transposed_state():
    x = inputs.random(1, 20, H=1, K=64)
    do, dstate = inputs.arriving(x)
    expected = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    transposed = x | {"initial_state": x["initial_state"].mT.contiguous().mT}
    found = evaluate(gated_delta_rule, transposed, do, dstate, normalize_qk=True)
    assert torch.equal(found["dinitial_state"], expected["dinitial_state"])
