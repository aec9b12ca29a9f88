"""Test what a device is taken for when the settings of kernels are chosen."""

from types import SimpleNamespace

import pytest
import torch

from lrnn.kernels.common.architecture import ADA, HOPPER, architecture


@pytest.fixture(autouse=True)
def nothing_kept():
    architecture.cache_clear()
    yield
    architecture.cache_clear()


def test_a_gpu_is_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    properties = SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert architecture(torch.device("cuda")) == ADA and ADA.name == "sm_89"


def test_a_cpu_has_the_settings_of_hopper():
    assert architecture(torch.device("cpu")) is HOPPER
