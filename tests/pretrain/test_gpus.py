"""Test the table of GPUs."""

import pytest

from lrnn.errors import UserError
from lrnn.pretrain.gpus import GPUS, find_device, find_gpu


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GH200 144G HBM3e", "GH200-144GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ],
)
def test_names_of_devices(device, name):
    found = find_device(device)
    assert found is not None and found.name == name
    assert find_gpu(device) == found


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "Tesla T4", ""])
def test_unknown_devices(device):
    assert find_device(device) is None


def test_names_in_the_table():
    assert [find_gpu(gpu.name.lower()) for gpu in GPUS] == list(GPUS)
    assert find_gpu(" rtx 4090 ").name == "RTX-4090"
    with pytest.raises(UserError, match=r"--gpu H1000 is not known.*H100"):
        find_gpu("H1000")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_rates_are_dense(gpu):
    """Tensor cores double their rate from bf16 to fp8, up to rounding; they have fp8 from capability 8.9 on."""
    assert (gpu.float8 is not None) == (gpu.capability >= (8, 9))
    assert gpu.float8 is None or gpu.float8 / gpu.bfloat16 == pytest.approx(2, rel=0.02)
