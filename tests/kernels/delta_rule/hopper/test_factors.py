"""Test the kernels in Gluon, run on the CPU, with several factors per token.

Their results are those for queries, and gradients of outputs, of zeros at every step but a token's last. That these are
the recurrence's is tested beside this file.
"""

import chunk_equations as equations
import pytest
import torch
import torch.nn.functional as F
from chunk_equations import D, check, nans, normal
from delta_rule_calls import BackendCall

from lrnn.kernels.common.constants import CHUNK
from lrnn.kernels.delta_rule.hopper import chunk_forward
from lrnn.kernels.delta_rule.hopper.backend import Hopper

STEPS = 2 * CHUNK


def inputs(factors, H, HV, dtype, seed):
    """Return the tensors of a call: q, the gate and do by token, and the others by step."""
    tokens = STEPS // factors
    x = {"q": normal(1, tokens, H, D, seed=seed), "do": normal(1, tokens, HV, D, seed=seed + 1)}
    x |= {"k": normal(1, STEPS, H, D, seed=seed + 2), "v": normal(1, STEPS, HV, D, seed=seed + 3)}
    x = {name: y.to(dtype) for name, y in x.items()}
    x |= {"a": normal(1, tokens, HV, seed=seed + 4), "b": normal(1, STEPS, HV, seed=seed + 5)}
    return x | {"A_log": normal(HV, seed=seed + 6) - 2, "dt_bias": normal(HV, seed=seed + 7)}


def with_zeros(x, factors):
    """Return the same call by step. A raw gate of -inf is no decay."""

    def last(y):
        return F.pad(y.unsqueeze(2), (0, 0, 0, 0, factors - 1, 0)).flatten(1, 2)

    first = F.pad(x["a"].unsqueeze(2), (0, 0, 0, factors - 1), value=-torch.inf).flatten(1, 2)
    return x | {"q": last(x["q"]), "do": last(x["do"]), "a": first}


def run(x, factors):
    """Return the results of all four kernels."""
    (_, T, HV, _), dtype, tokens = x["v"].shape, x["v"].dtype, x["q"].shape[1]
    options = {"scale": equations.SCALE, "normalize_qk": True, "gate": "raw", "beta_range": 2.0, "factors": factors}
    c, vectors = nans(T, HV * CHUNK, dtype=dtype), nans(4 * HV, T)
    call = BackendCall(Hopper, *(x[n] for n in "qkv"), c, vectors, **options)
    call.chunk_inverse(x["a"], x["b"], x["A_log"], x["dt_bias"])
    initial, dfinal = normal(1, HV, D, D, seed=90), normal(1, HV, D, D, seed=91)
    found = {"o": nans(1, tokens, HV, D, dtype=dtype), "final": nans(1, HV, D, D)}
    kept = {"y": nans(T, HV * D, dtype=dtype), "states": nans(T // CHUNK * HV * D, D, dtype=dtype)}
    call.forward_scan(initial, found["final"], o=found["o"], **kept)
    scanned = {"dv": nans(1, T, HV, D, dtype=dtype), "dstates": nans(T // CHUNK * HV * D, D, dtype=dtype)}
    found["dinitial"] = nans(1, HV, D, D)
    call.backward_scan(x["do"], dfinal, found["dinitial"], **scanned)
    found |= {"dq": nans(1, tokens, HV, D, dtype=dtype), "dk": nans(1, T, HV, D, dtype=dtype)}
    found |= {name: nans(HV, T) for name in ("dbeta", "dot_q", "dot_k")}
    found["dot_q"].zero_()  # it is written at the tokens' last steps
    parts = {name: found[name] for name in ("dq", "dk", "dbeta", "dot_q", "dot_k")}
    call.chunk_backward(x["do"], **scanned, **kept, **parts)
    *rows, log_rq = vectors.view(HV, 4, T).unbind(1)
    return found | kept | scanned | {"c": c, "gates, steps and norms of keys": torch.stack(rows), "log_rq": log_rq}


@pytest.mark.parametrize(
    ("factors", "halves", "H", "HV", "dtype"),
    [(2, 2, 1, 1, torch.bfloat16), (4, 1, 1, 2, torch.float16)],
)
def test_results_are_those_with_zeros(factors, halves, H, HV, dtype, run_on_cpu, monkeypatch):
    run_on_cpu()
    monkeypatch.setattr(chunk_forward, "FULL", 1 if halves == 2 else 1000)
    x = inputs(factors, H, HV, dtype, seed=factors)
    expected = run(with_zeros(x, factors), 1)
    found = run(x, factors)
    found["log_rq"] = found["log_rq"][:, ::factors]  # the tiles of queries have them at the tokens' first steps
    by_token = {name: expected[name][:, factors - 1 :: factors] for name in ("o", "dq", "log_rq")}
    check(found, expected | by_token, 1e-6)
