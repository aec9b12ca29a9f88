"""Test the float64 recurrence that kernels are compared with, against explicit matrices in NumPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from delta_rule_truth import (
    check,
    evaluate,
    evaluate_truth,
    fused_gated_delta_rule,
    gated_delta_product,
    gated_delta_rule,
    relative_error,
)

from lrnn.kernels.reference import delta_rule as reference


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rule_inputs(B=2, T=130, H=2, HV=2, K=8, V=12):
    return {
        "q": random(0, B, T, H, K),
        "k": F.normalize(random(1, B, T, H, K), dim=-1),
        "v": random(2, B, T, HV, V),
        "g": -0.3 * random(3, B, T, HV).abs(),
        "beta": 2 * torch.rand(B, T, HV, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    }


def numpy_product(q, k, v, g, beta, state):
    """Return o [T, V] and the final state of one row and value head, computed with explicit matrices. k [T, n, K]."""
    S = np.array(state)
    out = []
    for t in range(len(q)):
        S = np.exp(g[t]) * S
        for k_j, v_j, beta_j in zip(k[t], v[t], beta[t], strict=True):
            S = (np.eye(len(k_j)) - beta_j * np.outer(k_j, k_j)) @ S + beta_j * np.outer(k_j, v_j)
        out.append(S.T @ q[t] / len(q[t]) ** 0.5)
    return np.array(out), S


def test_matches_matrices_with_grouped_heads_factors_and_documents():
    B, T, H, HV, K, V, n = 2, 70, 2, 4, 8, 12, 3
    q, k, v = random(0, B, T, H, K), random(1, B, T, n, H, K), random(2, B, T, n, HV, V)
    g, beta = -0.1 * random(3, B, T, HV).abs(), 0.3 * random(4, B, T, n, HV).abs()
    bounds = [0, 1, 1, 65, 70, 140]
    start = random(5, len(bounds) - 1, HV, K, V)
    o, final = gated_delta_product(
        q, k, v, g, beta, initial_state=start, output_final_state=True, cu_seqlens=torch.tensor(bounds)
    )
    flat = [x.flatten(0, 1).numpy() for x in (q, k, v, g, beta)]
    o = o.flatten(0, 1)
    for n_doc, (a, b) in enumerate(pairwise(bounds)):
        for h in range(HV):
            q_, k_, v_, g_, beta_ = (x[a:b] for x in flat)
            hk = h // (HV // H)
            args = q_[:, hk], k_[:, :, hk], v_[:, :, h], g_[:, h], beta_[:, :, h]
            o_true, final_true = numpy_product(*args, start[n_doc, h].numpy())
            if b > a:
                assert relative_error(o[a:b, h], torch.tensor(o_true)) < 1e-12
            assert relative_error(final[n_doc, h], torch.tensor(final_true)) < 1e-12


def test_documents_are_independent():
    tensors = {n: x.flatten(0, 1)[None] for n, x in rule_inputs().items()}
    bounds = [0, 30, 30, 31, 160, 260]
    start = random(5, len(bounds) - 1, 2, 8, 12)
    o, final = gated_delta_rule(
        **tensors, initial_state=start, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a == b:
            assert torch.equal(final[n], start[n])
            continue
        part = {name: x[:, a:b] for name, x in tensors.items()}
        o_alone, final_alone = gated_delta_rule(**part, initial_state=start[n : n + 1], output_final_state=True)
        assert relative_error(o[:, a:b], o_alone) < 1e-13 and relative_error(final[n : n + 1], final_alone) < 1e-13


@pytest.mark.parametrize("gated", [True, False])
def test_outputs_and_gradients_match_the_chunkwise_reference(gated):
    """Compare two forms of the same function in float64, with autograd through both."""
    tensors = rule_inputs() | {"initial_state": random(5, 2, 2, 8, 12)}
    if not gated:
        tensors["g"] = None
    arriving = random(6, 2, 130, 2, 12), random(7, 2, 2, 8, 12)

    found = evaluate(reference.gated_delta_rule, tensors, *arriving)
    check(found, evaluate_truth(gated_delta_rule, tensors, *arriving), {"": 1e-11}, "")


def test_gradients_of_the_raw_projections_match_finite_differences():
    """gradcheck perturbs every input, so normalisation, sigmoid and softplus are included."""
    B, T, H, K = 1, 3, 1, 3
    tensors = [random(i, B, T, H, K) for i in range(3)] + [random(3, B, T, H), random(4, B, T, H)]
    tensors += [random(5, H), random(6, H), random(7, B, H, K, K)]
    leaves = [x.requires_grad_() for x in tensors]

    def function(*args):
        return fused_gated_delta_rule(*args[:-1], initial_state=args[-1], output_final_state=True)

    assert torch.autograd.gradcheck(function, leaves)


def test_normalised_keys_reflect_exactly():
    """With beta = 2 and no gate, two steps restore the state for any length of the key."""
    k = (3 * random(0, 1, 1, 1, 8)).bfloat16().expand(1, 6, 1, 8)
    start = random(1, 1, 1, 8, 5)
    zero, two = torch.zeros(1, 6, 1, 5), torch.full((1, 6, 1), 2.0)
    _, final = gated_delta_rule(k, k, zero, None, two, normalize_qk=True, initial_state=start, output_final_state=True)
    assert relative_error(final, start) < 1e-14


def test_the_comparison_fails_on_wrong_results():
    truth = {"o": torch.ones(4), "dq": torch.zeros(4)}
    check({"o": truth["o"] + 1e-4, "dq": torch.zeros(4)}, truth, {"": 1e-3}, "")
    for wrong in ({"o": truth["o"] + 1e-2}, {"o": truth["o"] * float("nan")}, {"dq": torch.full((4,), 1e-6)}):
        with pytest.raises(AssertionError):
            check(truth | wrong, truth, {"": 1e-3}, "")
