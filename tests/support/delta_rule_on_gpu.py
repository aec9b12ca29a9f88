"""Random inputs of training's size on a GPU, and bounds of the errors of outputs and gradients for some of them."""

import delta_rule_inputs as inputs
import torch
from delta_rule_inputs import BARS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# If keys (nearly) repeat, the rounding of the operands adds up over all tokens. These bounds of each dtype hold after
# 200 tokens. The one of float32 shows that the errors are rounding and nothing else.
HARD = {BF16: {"": 2e-1}, FP16: {"": 1e-1, "dbeta": 2e-1}, FP32: {"": 5e-4}}
# Gates and step sizes at their limits do not add up rounding; they get twice the usual bars.
LIMITS = {dtype: {name: 2 * bar for name, bar in bars.items()} for dtype, bars in BARS.items()}


def random(*sizes, **options):
    return inputs.random(*sizes, **{"K": 128, "device": "cuda", "dtype": BF16, **options})
