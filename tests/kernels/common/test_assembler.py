"""Test for which versions of the assembler, and on which GPUs, a warning is issued."""

import warnings

import pytest
import torch

from lrnn.kernels.common import assembler as module


@pytest.fixture
def assembler(monkeypatch):
    """Return a function that sets compute capability and ptxas version, and returns `check_assembler`'s warnings."""

    def warned(capability, ptxas, device="cuda", calls=1):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(module, "ptxas_version", lambda: ptxas)
        module.check_assembler.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(calls):
                module.check_assembler(torch.device(device))
        return [str(w.message) for w in caught]

    yield warned
    module.check_assembler.cache_clear()


def test_an_assembler_that_may_miscompile_is_warned_about_once(assembler):
    (message,) = assembler((9, 0), (12, 8), calls=3)
    assert "ptxas 12.8" in message and "before 13.3" in message and "TRITON_PTXAS_PATH" in message
    assert len(assembler((9, 0), (13, 2))) == 1


def test_a_safe_assembler_and_other_devices_are_not_warned_about(assembler):
    assert not assembler((9, 0), (13, 3)) and not assembler((9, 0), (13, 4))
    assert not assembler((8, 0), (12, 8)) and not assembler((10, 0), (12, 8))
    assert not assembler((9, 0), (12, 8), device="cpu")
