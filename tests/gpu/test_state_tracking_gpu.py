"""The state-tracking tasks draw the same samples on the GPU as on the CPU."""

import pytest
import torch

from lrnn.eval.state_tracking.counter_rng import split_seed
from lrnn.eval.state_tracking.tasks import TASKS, make_task


@pytest.mark.parametrize("name", TASKS)
def test_cuda_draws_what_the_cpu_draws(name):
    task = make_task(name)
    for low, high in ((5, 40), (40, 256)):
        seed, indices = split_seed(11, "test"), torch.arange(500)
        on_cpu = task.batch(seed, indices, low, high)
        on_cuda = task.batch(seed, indices, low, high, device="cuda")
        for expected, got in zip(on_cpu, on_cuda, strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), expected)
