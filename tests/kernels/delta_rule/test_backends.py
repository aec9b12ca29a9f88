"""Test the choice of the backend that a call runs on."""

from types import SimpleNamespace

import pytest
import torch

from lrnn.kernels.delta_rule import backends
from lrnn.kernels.delta_rule.hopper import backend as hopper_backend
from lrnn.kernels.delta_rule.hopper.backend import Hopper
from lrnn.kernels.delta_rule.portable.backend import Portable


def a_call(**changes):
    """Return the part of a call that determines the backend."""
    fields = {"K": 128, "V": 128, "dtype": torch.bfloat16, "is_full": True, "device": torch.device("cuda")}
    return SimpleNamespace(**fields | changes)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets the compute capability and the version of ptxas."""

    def set_to(capability, ptxas):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(hopper_backend, "ptxas_version", lambda: ptxas)

    return set_to


def test_hopper_is_chosen_for_calls_that_its_kernels_support(machine):
    machine((9, 0), (13, 5))
    for call in (a_call(), a_call(dtype=torch.float16)):
        assert Hopper.fits(call) and backends.choose_backend(call) is Hopper
    for change in ({"K": 64, "V": 64}, {"V": 256}, {"dtype": torch.float32}, {"is_full": False}):
        assert not Hopper.fits(a_call(**change)) and backends.choose_backend(a_call(**change)) is Portable


OTHER_GPUS = ((8, 0), (8, 9), (10, 0), (10, 3), (12, 0))


@pytest.mark.parametrize(("capability", "ptxas"), [((9, 0), (12, 8)), *((gpu, (13, 5)) for gpu in OTHER_GPUS)])
def test_another_gpu_or_an_assembler_that_may_miscompile_rules_hopper_out(machine, capability, ptxas):
    machine(capability, ptxas)
    assert not Hopper.fits(a_call()) and backends.choose_backend(a_call()) is Portable


def test_the_first_backend_that_fits_is_chosen(monkeypatch):
    """Another family of GPUs needs only a class before the others."""

    class Other(Portable):
        @staticmethod
        def fits(call):
            return call.K == 128

    monkeypatch.setattr(backends, "BACKENDS", (Other, Portable))
    assert backends.choose_backend(a_call()) is Other
    assert backends.choose_backend(a_call(K=64)) is Portable


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_backends_have_the_same_interface(backend):
    members = {name for name in vars(backends.Backend) if not name.startswith("_")}
    assert members == {"fits", "chunk_inverse", "forward_scan", "backward_scan", "chunk_backward"}
    assert all(callable(getattr(backend, name)) for name in members)
