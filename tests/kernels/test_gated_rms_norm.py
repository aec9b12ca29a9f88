"""Test `gated_rms_norm` on CPU tensors, where it is the reference, and the inputs that it refuses.

The kernels are tested in `interpreted/` and `tests/gpu`.
"""

import pytest
import torch
from gated_rms_norm_truth import check, make, output_and_gradients, true_output_and_gradients

from lrnn.kernels.gated_rms_norm import gated_rms_norm

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dtype", "gate_dtype"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16)])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 2, 64), (2, 300)])
def test_matches_the_truth(shape, dtype, gate_dtype, gated):
    inputs = make(shape, dtype=dtype, gate_dtype=gate_dtype, gated=gated)
    check(output_and_gradients(gated_rms_norm, *inputs), true_output_and_gradients(*inputs), *inputs[:3])


@pytest.mark.parametrize("gated", [True, False])
def test_float64_is_computed_in_float64(gated):
    x, gate, weight, _ = make((2, 5), dtype=FP64, weight_dtype=FP64, gated=gated)
    assert torch.autograd.gradcheck(lambda *args: gated_rms_norm(*args, 1e-3), (x, gate, weight))


def test_compiles_to_one_graph():
    inputs = make((2, 3, 2, 64))
    step = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager")
    check(output_and_gradients(step, *inputs), true_output_and_gradients(*inputs), *inputs[:3])


X, W = torch.zeros(2, 3, 8), torch.zeros(8)
REFUSED = {
    "a number": (torch.tensor(1.0), None, W, r"\[..., D\]"),
    "rows of nothing": (X[..., :0], None, W[:0], "D from 1"),
    "gate of another shape": (X, X[:1], W, "shape of x"),
    "weight of another size": (X, X, W[:4], r"weight be \[D\]"),
    "weight of two dimensions": (X, X, W[None], r"weight be \[D\]"),
    "integers": (X.int(), None, W, "bfloat16"),
    "a gate of integers": (X, X.int(), W, "gate must have one of the dtypes"),
    "another device": (X, X.to("meta"), W, "one device"),
}


@pytest.mark.parametrize(("x", "gate", "weight", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(x, gate, weight, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(x, gate, weight, 1e-6)
