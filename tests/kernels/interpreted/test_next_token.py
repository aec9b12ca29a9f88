"""Test the kernel of the next token against the composition of its parts in float64."""

import pytest
import torch
from next_token_truth import make_inputs, true_next_token

from lrnn.kernels.delta_rule.next_token import next_token


def errors(inputs: dict) -> dict[str, float]:
    """Return the relative errors of the kernel's output, window and state."""
    expected = true_next_token(inputs)
    state = inputs["state"].clone()
    y, window = next_token(**inputs | {"state": state})
    assert y.dtype == inputs["qkv"][2].dtype and y.shape == inputs["qkv"][2].shape
    found = {"y": y, "window": window, "state": state}
    return {name: float((found[name].double() - x).norm() / max(x.norm(), 1e-9)) for name, x in expected.items()}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("H", "HV", "K", "V", "taps"), [(2, 2, 64, 64, 4), (2, 4, 12, 24, 4), (1, 3, 16, 32, 2), (2, 2, 24, 16, 1)]
)
def test_sizes(H, HV, K, V, taps, gated):
    found = errors(make_inputs(B=3, H=H, HV=HV, K=K, V=V, taps=taps, gated=gated))
    assert found["window"] == 0 and max(found.values()) < 2e-6, found


def test_half_precision_rounds_the_output_alone():
    found = errors(make_inputs(B=2, H=2, HV=2, K=64, V=64, taps=4, gated=True, dtype=torch.float16))
    assert found["window"] == 0 and found["state"] < 2e-6 and found["y"] < 5e-4, found


def test_projections_that_are_slices():
    """Merged products are passed as slices of one tensor."""
    inputs = make_inputs(B=3, H=2, HV=2, K=16, V=16, taps=4, gated=True)
    together = torch.cat([*inputs["qkv"], inputs["gate"]], -1).split(32, -1)
    inputs |= {"qkv": together[:3], "gate": together[3]}
    assert max(errors(inputs).values()) < 2e-6
