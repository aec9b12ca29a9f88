"""Compare the kernels in Gluon with the plain ones. Equations and roundings are the same, so results nearly agree.

The tests in `delta_rule/` compare both with a float64 recurrence. They run the kernels in Gluon wherever chunks are
full and heads have size 128.
"""

import delta_rule_inputs as inputs
import pytest
import torch
from delta_rule_calls import BackendCall, replace_launch
from delta_rule_truth import evaluate, relative_error

from lrnn.kernels.common.assembler import SAFE_PTXAS, ptxas_version
from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.common.dtypes import matrix_dtype
from lrnn.kernels.common.launch import launch
from lrnn.kernels.delta_rule import backends
from lrnn.kernels.delta_rule.api import gated_delta_rule
from lrnn.kernels.delta_rule.hopper.backend import Hopper
from lrnn.kernels.delta_rule.portable.backend import Portable

PLAIN = {"chunk_inverse_kernel", "chunk_forward_kernel", "chunk_scan_backward_kernel", "chunk_backward_kernel"}
GLUON = {name.replace("_kernel", "_hopper_kernel") for name in PLAIN}


@pytest.fixture
def launched(monkeypatch):
    names = []

    def note(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    replace_launch(monkeypatch, note)
    return names


def needs_gluon():
    if ptxas_version() < SAFE_PTXAS:
        pytest.skip(f"with ptxas {ptxas_version()} the kernels in Gluon are not used")


# one program per head with all its values (H * B >= 100), one per half, and segments whose transitions are joined
@pytest.mark.parametrize("sizes", [(2, 64, 1, 1), (2, 512, 2, 4), (7, 256, 16, 16), (1, 8192, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("precision", ["standard", "split"])
def test_kernels_in_gluon_agree_with_the_plain_ones(sizes, dtype, normalize, precision, launched, monkeypatch):
    B, T, H, HV = sizes
    x = inputs.random(B, T, H, K=128, HV=HV, device="cuda", dtype=dtype)
    x = x if normalize else inputs.unit_keys(x)  # longer keys would make the state grow
    needs_gluon()
    do, dstate = inputs.arriving(x)
    gluon = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=normalize, precision=precision)
    assert not PLAIN & set(launched) and set(launched) >= GLUON
    launched.clear()
    monkeypatch.setattr(backends, "BACKENDS", (Portable,))
    plain = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=normalize, precision=precision)
    assert not GLUON & set(launched) and set(launched) >= PLAIN
    assert gluon.keys() == plain.keys()
    errors = {name: relative_error(gluon[name], plain[name]) for name in plain}
    print(errors)
    # Sums in another order occasionally change the last bit of a 16-bit state.
    bar = 5e-3 if dtype == torch.bfloat16 else 1e-3
    assert max(errors.values()) < bar, errors


def inside_chunks(B, T, H, HV, dtype, normalize, seed=0):
    """Return a call's scans, and random inputs of the backward pass inside its chunks, as if from scans."""
    D, r = 128, torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, device="cuda")

    q, k = (normal(B, T, H, D) / (1 if normalize else D**0.5) for _ in range(2))
    q, k, v, do = (x.to(dtype) for x in (q, k, normal(B, T, HV, D), normal(B, T, HV, D)))
    y, dv = normal(B * T, HV * D).to(dtype), normal(B, T, HV, D).to(dtype)
    states, dstates = (normal(B * T // CHUNK * HV * D, D).to(dtype) for _ in range(2))
    gates = -0.1 * torch.rand(HV, B * T // CHUNK, CHUNK, generator=r, device="cuda")
    vectors = torch.zeros(HV, 4, B * T, device="cuda")
    vectors[:, 0] = gates.cumsum(-1).flatten(1)
    vectors[:, 1] = 2 * torch.rand(HV, B * T, generator=r, device="cuda")
    vectors[0, 1, 7::50] = 0.0
    for row, x in ((2, k), (3, q)):
        norms = torch.linalg.vector_norm(x.float(), dim=-1).repeat_interleave(HV // H, -1)
        vectors[:, row] = -torch.log2(norms).flatten(0, 1).T if normalize else torch.nan
    c = torch.zeros(B * T, HV * CHUNK, device="cuda", dtype=torch.float16)
    call = BackendCall(Hopper, q, k, v, c, vectors.flatten(0, 1), scale=D**-0.5, normalize_qk=normalize)
    return call, {"do": do, "dv": dv, "y": y, "states": states, "dstates": dstates}


def chunk_backward(call, given):
    """Return all results of the backward pass inside chunks. Elements that it does not write are NaN."""
    sizes = call.call
    results = {n: sizes.empty(sizes.B, sizes.T, sizes.HV, sizes.K, dtype=sizes.dtype) for n in ("dq", "dk")}
    results |= {n: sizes.empty(sizes.HV, sizes.R) for n in ("dbeta", "dot_q", "dot_k")}
    for x in results.values():
        x.fill_(torch.nan)
    given = given | {"dv": given["dv"].clone()}  # finished in place
    call.chunk_backward(**given, **results)
    return results | {"dv": given["dv"]}


def matrices(B, T, H, HV, dtype, normalize, gate, backend, seed=0):
    """Return C and the rows of numbers that `chunk_inverse` writes. Elements that it does not write are NaN."""
    D, r = 128, torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, device="cuda")

    k = normal(B, T, H, D)
    k[:, T // 2 :] = k[:, T // 2 : T // 2 + 1]  # many equal keys
    k = (k if normalize else torch.nn.functional.normalize(k, dim=-1)).to(dtype)
    a, b, v = normal(B, T, HV), normal(B, T, HV), normal(B, T, HV, D).to(dtype)
    if gate == "raw":
        given = a.to(dtype), (2 * b).to(dtype), (4 * torch.rand(HV, generator=r, device="cuda")).log(), normal(HV) - 2
    else:
        given = -a.abs() if gate == "log" else None, 2 * b.sigmoid(), None, None
    c = torch.full((B * T, HV * CHUNK), torch.nan, dtype=matrix_dtype(dtype, normalize), device="cuda")
    vectors = torch.full((4 * HV, B * T), torch.nan, device="cuda")
    options = {"scale": D**-0.5, "normalize_qk": normalize, "gate": gate, "beta_range": 2.0 if gate == "raw" else None}
    call = BackendCall(backend, k, k, v, c, vectors, **options)
    assert Hopper.fits(call.call)
    call.chunk_inverse(*given)
    rows = vectors.view(HV, 4, -1)[:, : 3 if normalize else 4]
    return {"c": c, "gates": rows[:, 0], "beta": rows[:, 1], "norms": rows[:, 2:]}


@pytest.mark.parametrize("sizes", [(1, 64, 1, 1), (2, 192, 2, 4), (2, 4096, 4, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", ["raw", "log", "none"])
def test_matrices_in_gluon_agree_with_the_plain_ones(sizes, dtype, normalize, gate, launched):
    needs_gluon()
    gluon = matrices(*sizes, dtype, normalize, gate, Hopper)
    for _ in range(5):
        again = matrices(*sizes, dtype, normalize, gate, Hopper)
        assert all(torch.equal(again[name], gluon[name]) for name in gluon)
    plain = matrices(*sizes, dtype, normalize, gate, Portable)
    assert set(launched) == {"chunk_inverse_hopper_kernel", "chunk_inverse_kernel"}
    # C may differ in the last bit of some elements, the others by the order of float32 sums.
    bar = 2e-3 if gluon["c"].dtype == torch.bfloat16 else 3e-4
    for name, x in plain.items():
        assert torch.isfinite(gluon[name]).all(), name
        difference = (gluon[name].double() - x.double()).norm().item()
        assert difference <= (bar if name == "c" else 2e-6) * x.double().norm().item(), (name, difference)


# fewer chunks and heads than multiprocessors; one per multiprocessor and two for some; many per multiprocessor
@pytest.mark.parametrize("sizes", [(1, 64, 1, 1), (2, 192, 2, 4), (1, 640, 15, 15), (2, 4096, 4, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_backward_inside_chunks_in_gluon_agrees_with_the_plain_one(sizes, dtype, normalize, launched):
    needs_gluon()
    call, given = inside_chunks(*sizes, dtype, normalize)
    assert Hopper.fits(call.call)
    gluon = chunk_backward(call, given)
    for _ in range(5):
        again = chunk_backward(call, given)
        assert all(torch.equal(again[name], gluon[name]) for name in gluon)
    call.backend = Portable
    plain = chunk_backward(call, given)
    assert set(launched) == {"chunk_backward_hopper_kernel", "chunk_backward_kernel"}
    errors = {name: relative_error(gluon[name], plain[name]) for name in plain}
    print(errors)
    # Sums in another order occasionally change the last bit of dP', dM' or a result. The plain kernel scales rows after
    # the product with dS'. The kernel in Gluon scales them before it, and so rounds them once more.
    bars = {"dk": 3e-3, "dot_k": 3e-3} if dtype == torch.bfloat16 else {}
    assert all(error < bars.get(name, 1e-3) for name, error in errors.items()), errors
