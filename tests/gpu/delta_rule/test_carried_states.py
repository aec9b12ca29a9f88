"""Compare states carried over thousands of tokens without a gate, at beta = 2, by our kernels, fla's and FlashQLA's."""

import functools
import importlib.util

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import pytest
import torch
from delta_rule_compare import compare
from delta_rule_inputs import BARS
from delta_rule_on_gpu import BF16, FP16, FP32, random
from delta_rule_truth import relative_error

from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_rule


def span_error(state, true, keys):
    """Return the relative error of the part of the states [H, K, V] that lies in the span of their keys [T, H, K]."""
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
    """Applying the factor T times is S - (1 - (1 - beta)^T) k k^T S; at beta = 2 this is parity."""
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


def test_tracking_compared_with_the_peers():
    """Carry a state, set once, by reflections along a few keys for 4,096 tokens. All get the same raw bf16 keys."""
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
    """Check all results of the scans in Gluon (without documents, in 16 bits) and of the plain ones."""
    bounds = torch.tensor([0, 0, 1, 80, 1000, 2048], device="cuda") if documents else None
    x = random(2, 1024, dtype=dtype, states=5 if documents else None, raw=True)
    ours = functools.partial(fused_gated_delta_rule, precision="split")
    compare(x, BARS[dtype], f"split, {dtype}", ours, truth.fused_gated_delta_rule, cu_seqlens=bounds)
