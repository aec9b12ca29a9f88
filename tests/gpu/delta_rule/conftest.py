"""Test the kernels of the gated delta rule on the GPU, at the sizes of training, against the float64 recurrence.

With -s, every error is printed, and how exactly our kernels, fla's and FlashQLA's (if installed) carry a state.
"""

import pytest
import torch
from nan_buffers import fill_new_buffers_with_nan


@pytest.fixture
def plain_buffers():
    """Leave new buffers as they are, for tests of memory and speed."""


@pytest.fixture(autouse=True)
def nan_buffers(request, monkeypatch):
    if "plain_buffers" not in request.fixturenames:
        fill_new_buffers_with_nan(monkeypatch)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()
