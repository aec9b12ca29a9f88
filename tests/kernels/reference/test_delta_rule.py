"""Test the reference against independent truths: a float64 recurrence in NumPy, autograd, and transformers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from lrnn.kernels.delta_rule.api import gated_delta_product
from lrnn.kernels.reference import delta_rule as reference
from lrnn.kernels.reference.delta_rule import gated_delta_rule
from lrnn.kernels.reference.documents import document_ids


def numpy_recurrence(q, k, v, g, beta, state=None):
    """Compute S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T with explicit matrices, in float64."""
    q, k, v, g, beta = (np.asarray(x, dtype=np.float64) for x in (q, k, v, g, beta))
    B, T, H, K = q.shape
    o = np.zeros((B, T, H, v.shape[-1]))
    final = np.zeros((B, H, K, v.shape[-1]))
    for b in range(B):
        for h in range(H):
            S = np.zeros((K, v.shape[-1])) if state is None else np.array(state[b, h], dtype=np.float64)
            for t in range(T):
                kt = k[b, t, h][:, None]
                A = np.exp(g[b, t, h]) * (np.eye(K) - beta[b, t, h] * kt @ kt.T)
                S = A @ S + beta[b, t, h] * kt @ v[b, t, h][None, :]
                o[b, t, h] = S.T @ q[b, t, h] / np.sqrt(K)
            final[b, h] = S
    return o, final


def inputs(T, B=2, H=3, K=16, V=24, seed=0, gate=0.3, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(B, T, H, K, generator=r, dtype=torch.float64), dim=-1)
    k = F.normalize(torch.randn(B, T, H, K, generator=r, dtype=torch.float64), dim=-1)
    v = torch.randn(B, T, H, V, generator=r, dtype=torch.float64)
    g = -gate * torch.rand(B, T, H, generator=r, dtype=torch.float64)
    beta = 2 * torch.rand(B, T, H, generator=r, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, g, beta)]


def error(x, truth):
    truth = torch.as_tensor(truth)
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("T", [1, 2, 15, 63, 64, 65, 127, 200])
@pytest.mark.parametrize("gate", [0.0, 0.3, 20.0])
def test_matches_the_float64_recurrence(T, gate):
    args = inputs(T, gate=gate)
    o, final = gated_delta_rule(*args, output_final_state=True)
    o_true, final_true = numpy_recurrence(*args)
    assert error(o, o_true) < 2e-6 and error(final, final_true) < 2e-6


def test_no_gate_is_a_gate_of_one():
    q, k, v, g, beta = inputs(130)
    o, final = gated_delta_rule(q, k, v, None, beta, output_final_state=True)
    o_true, final_true = numpy_recurrence(q, k, v, 0 * g, beta)
    assert error(o, o_true) < 2e-6 and error(final, final_true) < 2e-6


def test_initial_state_and_continuation():
    args = inputs(150)
    start = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    o_true, final_true = numpy_recurrence(*args, state=start)
    o1, state = gated_delta_rule(*(x[:, :70] for x in args), initial_state=start, output_final_state=True)
    o2, final = gated_delta_rule(*(x[:, 70:] for x in args), initial_state=state, output_final_state=True)
    assert error(torch.cat([o1, o2], 1), o_true) < 2e-6 and error(final, final_true) < 2e-6


def test_one_token_at_a_time():
    args = inputs(20)
    state, outputs = None, []
    for t in range(20):
        o, state = gated_delta_rule(*(x[:, t : t + 1] for x in args), initial_state=state, output_final_state=True)
        outputs.append(o)
    o_true, final_true = numpy_recurrence(*args)
    assert error(torch.cat(outputs, 1), o_true) < 2e-6 and error(state, final_true) < 2e-6


@pytest.mark.parametrize("gated", [True, False])
def test_documents_are_independent(gated):
    """Packed documents, including empty and one-token ones, give the results of each document alone."""
    q, k, v, g, beta = inputs(200, gate=0.3 if gated else 0.0)
    cu_seqlens = torch.tensor([0, 1, 1, 30, 94, 200, 264, 300, 400], dtype=torch.int32)
    flat = [x.flatten(0, 1)[None] for x in (q, k, v, g, beta)]
    states = torch.randn(8, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    for initial in (None, states):
        o, final = gated_delta_rule(
            q, k, v, g if gated else None, beta,
            initial_state=initial, cu_seqlens=cu_seqlens, output_final_state=initial is not None,
        )  # fmt: skip
        o = o.flatten(0, 1)
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = None if initial is None else initial[n : n + 1]
            o_true, final_true = numpy_recurrence(*(x[:, start:end] for x in flat), state=state)
            if end > start:
                assert error(o[start:end], o_true[0]) < 2e-6, (start, end)
            if initial is not None:
                assert error(final[n], final_true[0]) < 2e-6, (start, end)


def test_document_ids():
    ids = document_ids(torch.tensor([0, 2, 2, 4, 8], dtype=torch.int32), 2, 4)
    assert (
        (ids[0].diff() != 0).tolist() == [False, True, False] and (ids[1] == ids[1, 0]).all() and ids[1, 0] > ids[0, 3]
    )


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_autograd_through_the_recurrence(packed):
    """The chunkwise backward pass in float64 agrees with autograd through the explicit recurrence."""
    args = [x.requires_grad_() for x in inputs(70, B=1, H=2, K=8, V=8, dtype=torch.float64)]
    q, k, v, g, beta = args
    boundaries = [0, 20, 70] if packed else [0, 70]
    outputs = []
    for start, end in pairwise(boundaries):
        S = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        for t in range(start, end):
            kk = torch.einsum("bhi,bhj->bhij", k[:, t], k[:, t])
            A = g[:, t].exp()[..., None, None] * (torch.eye(8, dtype=torch.float64) - beta[:, t, :, None, None] * kk)
            S = A @ S + beta[:, t, :, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / 8**0.5)
    o_true = torch.stack(outputs, 1)
    weights = torch.randn_like(o_true)
    true = torch.autograd.grad((o_true * weights).sum(), args)
    o, _ = gated_delta_rule(*args, cu_seqlens=torch.tensor(boundaries) if packed else None)
    ours = torch.autograd.grad((o * weights).sum(), args)
    for name, a, b in zip(("q", "k", "v", "g", "beta"), ours, true, strict=True):
        assert error(a, b) < 1e-10, name


@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_matches_transformers(function):
    q, k, v, g, beta = inputs(130, K=16, V=16)
    theirs = getattr(qwen3_next, function)
    theirs = getattr(theirs, "__wrapped__", theirs)  # if fla is installed, transformers uses fla's GPU kernels instead
    o_true, final_true = theirs(q, k, v, g=g, beta=beta, initial_state=None, output_final_state=True)
    o, final = gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    assert error(o, o_true.double()) < 1e-5 and error(final, final_true.double()) < 1e-5


def test_a_reflection_is_carried_far():
    """With one key, beta = 2 and no gate, an even number of steps restores the state (parity, arXiv 2411.12537)."""
    T = 4096
    k = F.normalize(torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(0)), dim=-1).expand(1, T, 1, 32)
    start = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    v, beta = torch.zeros(1, T, 1, 32), torch.full((1, T, 1), 2.0)
    _, final = gated_delta_rule(k, k, v, None, beta, initial_state=start, output_final_state=True)
    assert error(final, start.double()) < 1e-3


def test_strong_gates_and_extreme_betas_stay_exact():
    q, k, v, g, beta = inputs(130)
    g[:, ::3], g[:, 1::3] = -80.0, 0.0
    beta[:, ::2], beta[:, 1::4] = 2.0, 0.0
    o, final = gated_delta_rule(q, k, v, g, beta, output_final_state=True)
    o_true, final_true = numpy_recurrence(q, k, v, g, beta)
    assert error(o, o_true) < 2e-6 and error(final, final_true) < 2e-6


def test_autocast_does_not_reach_inside():
    args = inputs(130)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = gated_delta_rule(*args)
    assert error(o, numpy_recurrence(*args)[0]) < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(v=a["v"][:, :3]), "q and k must be"),
        (lambda a: a.update(beta=a["beta"][..., :1]), "beta must be"),
        (lambda a: a.update(initial_state=torch.zeros(2, 3, 16, 8)), "initial_state must be"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0.0, 10.0])), "cu_seqlens must be"),
    ],
)
def test_bad_shapes_are_named(change, message):
    args = dict(zip(("q", "k", "v", "g", "beta"), inputs(5), strict=True))
    change(args)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(g=torch.zeros(2, 4, 2, 3)), r"g must be \[B, T, HV\] = \[2, 4, 3\].*got \[2, 4, 2, 3\]"),
        (lambda a: a.update(beta=torch.ones(2, 4, 3)), r"beta must be .* = \[2, 4, 2, 3\]; got \[2, 4, 3\]"),
        (lambda a: a.update(beta=torch.ones(2, 8, 3)), r"beta must be .* = \[2, 4, 2, 3\]; got \[2, 8, 3\]"),
        (lambda a: a.update(k=torch.ones(2, 4, 2, 3, 7)), r"k \[2, 4, 2, 3, 7\]"),
        (lambda a: a.update(k=torch.ones(2, 4, 0, 3, 8), v=torch.ones(2, 4, 0, 3, 8)), "n_h > 0"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens must go from 0 to 8"),
    ],
)
@pytest.mark.parametrize("function", [gated_delta_product, reference.gated_delta_product])
def test_bad_shapes_of_factors_are_named_as_they_were_passed(change, message, function):
    args = {"q": torch.ones(2, 4, 3, 8), "k": torch.ones(2, 4, 2, 3, 8), "v": torch.ones(2, 4, 2, 3, 8)}
    args |= {"g": torch.zeros(2, 4, 3), "beta": torch.ones(2, 4, 2, 3)}
    function(**args)
    change(args)
    with pytest.raises(ValueError, match=message):
        function(**args)
