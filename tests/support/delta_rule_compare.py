"""Compare all outputs and gradients of a function with those of its truth, in the interpreter and on a GPU."""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import torch
from delta_rule_truth import check, evaluate, evaluate_truth, floors

from lrnn.kernels.delta_rule.api import fused_gated_delta_rule, gated_delta_rule


def compare(x, bars, label, ours=gated_delta_rule, true=truth.gated_delta_rule, zero=(), **options):
    """Compare all outputs and gradients with the truth. `zero` names gradients that are 0 except for rounding."""
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(true, x, do, dstate, **options)
    least = floors(expected, do) | dict.fromkeys(zero, torch.linalg.vector_norm(do.float()).item())
    check(evaluate(ours, x, do, dstate, **options), expected, bars, label, least)


def compare_fused(x, bars, label, **options):
    compare(x, bars, label, fused_gated_delta_rule, truth.fused_gated_delta_rule, **options)


def compare_short_vectors(x, bars):
    """Check vectors below the floor of |x|, 1e-6. A zero key neither writes nor erases, and x^ is linear in x there."""
    x["k"][:, 3], x["q"][:, 5] = 0.0, 0.0
    x["k"][:, 7] *= 1e-8
    short = [3, 5, 7]
    others = [t for t in range(x["k"].shape[1]) if t not in short]
    do, dstate = inputs.arriving(x)
    expected = evaluate_truth(truth.gated_delta_rule, x, do, dstate, normalize_qk=True)
    found = evaluate(gated_delta_rule, x, do, dstate, normalize_qk=True)
    # Their gradients are a million times larger than those of the other tokens, and would hide them in a common norm.
    for tokens in (short, others):

        def of_tokens(values, tokens=tokens):
            return {n: y[:, tokens] for n, y in values.items() if n not in ("final_state", "dinitial_state")}

        check(of_tokens(found), of_tokens(expected), bars, "short vectors" if tokens is short else "the others")
