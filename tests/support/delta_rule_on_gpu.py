"""Random inputs of training's size on a GPU, and what outputs and gradients may be off on some of them."""

import delta_rule_inputs as inputs
import torch
from delta_rule_inputs import BARS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Keys that repeat, or nearly, add up the rounding of the operands over all tokens: what each dtype may be off on them
# after 200. float32 shows that it is rounding and nothing else.
HARD = {BF16: {"": 2e-1}, FP16: {"": 1e-1, "dbeta": 2e-1}, FP32: {"": 5e-4}}
# Gates and step sizes at their limits do not add up rounding; they get twice the usual bars.
LIMITS = {dtype: {name: 2 * bar for name, bar in bars.items()} for dtype, bars in BARS.items()}


def random(*sizes, **options):
    return inputs.random(*sizes, **{"K": 128, "device": "cuda", "dtype": BF16, **options})
