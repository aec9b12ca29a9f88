"""The kernel of the next token on a GPU, in bfloat16 and at the sizes of the models, against float64."""

import pytest
import torch
from next_token_truth import make_inputs, true_next_token

from lrnn.kernels.delta_rule.next_token import next_token


@pytest.mark.parametrize(
    ("B", "H", "HV", "K", "V"), [(1, 16, 16, 128, 128), (256, 2, 2, 128, 128), (3, 2, 4, 96, 192), (2, 1, 2, 256, 256)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_against_float64(B, H, HV, K, V, dtype):
    inputs = make_inputs(B=B, H=H, HV=HV, K=K, V=V, taps=4, gated=True, dtype=dtype, device="cuda")
    expected = true_next_token(inputs)
    y, window = next_token(**inputs)
    found = {"y": y, "window": window, "state": inputs["state"]}
    errors = {name: float((found[name].double() - x).norm() / x.norm()) for name, x in expected.items()}
    print(errors)
    rounding = 3e-3 if dtype == torch.bfloat16 else 2e-6
    assert errors["window"] == 0 and errors["state"] < 2e-6 and errors["y"] < rounding, errors
