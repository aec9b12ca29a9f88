"""Test the settings that a GPU gets, which need not be there."""

import pytest
import torch

from lrnn.kernels.common.architecture import (
    A100,
    ADA,
    BLACKWELL,
    COMPILED,
    HOPPER,
    RTX_BLACKWELL,
    Architecture,
)
from lrnn.kernels.common.constants import HEAD_SIZES
from lrnn.kernels.delta_rule import api, call
from lrnn.kernels.delta_rule.call import Call
from lrnn.kernels.delta_rule.settings import choose_settings

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("K", "dtype", "forward", "backward", "inside", "precision"),
    [
        (64, BF16, (64, 4, 2), (64, 4, 2), (32, 4, 3), "tf32"),
        (128, BF16, (64, 4, 2), (64, 4, 2), (32, 4, 3), "tf32"),
        (256, BF16, (64, 8, 2), (64, 8, 1), (32, 8, 2), "tf32"),
        (64, FP32, (64, 4, 2), (64, 4, 2), (32, 8, 1), "tf32x3"),
        (128, FP32, (64, 4, 2), (64, 4, 2), (32, 8, 1), "tf32x3"),
        (256, FP32, (32, 4, 1), (32, 4, 1), (32, 8, 1), "tf32x3"),
    ],
)
def test_those_of_hopper_are_those_that_were_measured(K, dtype, forward, backward, inside, precision):
    """Another setting could change results bit by bit, and how fast they are."""
    assert choose_settings(K, dtype, HOPPER) == (precision, forward, backward, inside, True)
    if dtype == BF16:
        assert choose_settings(K, FP16, HOPPER) == choose_settings(K, BF16, HOPPER)


def test_less_memory_gets_smaller_settings():
    hopper = choose_settings(64, FP32, HOPPER)
    assert choose_settings(64, FP32, A100) == hopper
    assert choose_settings(128, FP32, A100).forward_scan.stages == 1 and not choose_settings(128, FP32, A100)[-1]
    for K in (64, 128):
        ada = choose_settings(K, FP32, ADA)
        assert ada.precision == "ieee" and ada.forward_scan.BV == ada.backward_scan.BV == 32
    for gpu in (BLACKWELL, RTX_BLACKWELL):
        assert choose_settings(64, FP32, gpu) == hopper.without_pipelining()
    assert choose_settings(256, BF16, BLACKWELL) == choose_settings(256, BF16, HOPPER)
    assert choose_settings(256, BF16, RTX_BLACKWELL).forward_scan.stages == 1


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("K", HEAD_SIZES)
def test_16_bits_are_for_every_architecture(K, dtype):
    for gpu in COMPILED:
        choose_settings(K, dtype, gpu)


def test_relatives_share_settings():
    """GPUs that kernels are not compiled for get the settings of those with as much memory."""
    for capability, like in (((8, 6), ADA), ((8, 7), A100), ((10, 3), BLACKWELL), ((12, 1), RTX_BLACKWELL)):
        relative = Architecture(capability, like.shared)
        for K, dtype in ((64, FP32), (128, FP32), (256, BF16)):
            assert choose_settings(K, dtype, relative) == choose_settings(K, dtype, like)


@pytest.mark.parametrize(("gpu", "memory"), [(A100, 163), (ADA, 99)])
def test_long_keys_in_float32_are_refused_where_they_do_not_fit(gpu, memory):
    message = (
        rf"do not fit into the {memory} KiB of shared memory per block that this GPU \({gpu.name}\) has, in float32 "
        "with keys of more than 128; use bfloat16 or float16, or heads of up to 128"
    )
    with pytest.raises(ValueError, match=message):
        choose_settings(256, FP32, gpu)


@pytest.mark.parametrize("gpu", [Architecture((7, 5), 64 * 1024), Architecture((12, 0), 64 * 1024)])
def test_gpus_with_too_little_are_refused(gpu):
    with pytest.raises(ValueError, match=rf"capability 8.0 or above with 99 KiB .* \({gpu.name}\) has 64"):
        choose_settings(128, BF16, gpu)


def test_a_gpu_is_checked_for_keys_as_they_are_padded():
    api.check_gpu(100, 192, FP32, ADA)
    with pytest.raises(ValueError, match=r"this GPU \(sm_89\)"):
        api.check_gpu(200, 64, FP32, ADA)


def test_a_call_takes_the_settings_of_its_gpu(monkeypatch):
    """Tiles, segments and the precision of products are those of the GPU."""
    k = torch.zeros(1, 8192, 1, 128)
    for gpu, segments, columns, precision in ((HOPPER, 8, 64, "tf32x3"), (ADA, 1, 32, "ieee")):
        monkeypatch.setattr(call, "architecture", lambda device, gpu=gpu: gpu)
        described = Call.of(k, k, k, None, None, None, 1.0, True, None)
        found = described.segments, described.columns, described.flags["PRECISION"]
        assert found == (segments, columns, precision)
