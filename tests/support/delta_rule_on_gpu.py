"""Random inputs of training's size on a GPU, and all outputs and gradients of a function against those of its truth."""

import delta_rule_inputs as inputs
import delta_rule_truth as truth
import torch
from delta_rule_inputs import BARS
from delta_rule_truth import check, evaluate, evaluate_truth, floors

from lrnn.kernels.gated_delta_rule import fused_gated_delta_rule, gated_delta_rule

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Keys that repeat, or nearly, add up the rounding of the operands over all tokens: what each dtype may be off on them
# after 200. float32 shows that it is rounding and nothing else.
HARD = {BF16: {"": 2e-1}, FP16: {"": 1e-1, "dbeta": 2e-1}, FP32: {"": 5e-4}}
# Gates and step sizes at their limits do not add up rounding; they get twice the usual bars.
LIMITS = {dtype: {name: 2 * bar for name, bar in bars.items()} for dtype, bars in BARS.items()}


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
