"""Compare the norm of the gradient with DeepSpeed's own."""

from types import SimpleNamespace

import deepspeed.comm
import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from lrnn.pretrain.gradient_norm import read_once


@pytest.fixture
def zero(monkeypatch):
    """Return what the norm needs of an optimizer on two ranks whose gradients are the same."""
    for module in (deepspeed.comm, torch.distributed):
        monkeypatch.setattr(module, "all_reduce", lambda tensor, op=None, group=None: tensor.mul_(2))
    return SimpleNamespace(
        device="cpu", dp_process_group=None, model_parallel_rank=0, _model_parallel_all_reduce=lambda **_: None
    )


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("count", [0, 3])
def test_it_is_that_of_deepspeed(zero, count, broken):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(5, 7)) for _ in range(count)]
    gradients = [10.0**i * torch.randn(5, 7) for i in range(count)]
    if broken is not None and count:
        gradients[1][2, 3] = broken
    padding = torch.full((9,), 1e9)
    padding._zero_padding = True
    gradients.insert(1, padding)
    expected = DeepSpeedZeroOptimizer.get_grad_norm_direct(zero, gradients, parameters)
    read_once(zero)
    found = zero.get_grad_norm_direct(gradients, parameters)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (found == -1) == (broken is not None and count > 0)
