"""GPUs: what they compute, hold and transfer, by the name that PyTorch gives them.

Rates are peaks of NVIDIA's datasheets and architecture whitepapers, without sparsity: half of the rates with sparsity,
where a datasheet has no others. They were compared with the tables of torchtitan (`torchtitan/tools/utils.py`: bf16),
Composer (`composer/callbacks/speed_monitor.py`: bf16, fp8 and float32 of A100, H100 and H200) and llm-analysis
(`llm_analysis/gpu_configs/`: memory, bandwidth and NVLink of A100 and H100), which agree. GeForce cards multiply at
half rate when they sum in float32, which is the rate given here.
"""

import re
from dataclasses import dataclass

from lrnn.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: what `lrnn plan --gpu` calls it.
        device: regular expression for its `torch.cuda.get_device_name`, after the vendor.
        capability: CUDA compute capability.
        bfloat16: TFLOP/s of products in bf16 with sums in float32.
        float8: the same in fp8; None if the GPU has none.
        float32: TFLOP/s in float32 without tf32, as PyTorch multiplies by default.
        memory: GB.
        bandwidth: GB/s of the memory.
        link: GB/s to the other GPUs of a node, in one direction: by NVLink, or by PCI Express where there is none.
    """

    name: str
    device: str
    capability: tuple[int, int]
    bfloat16: float
    float8: float | None
    float32: float
    memory: float
    bandwidth: float
    link: float


GPUS = (
    # Datasheets of A100, L40S, H100, H200, GH200, HGX B200 and GB200; whitepapers of Ada and RTX Blackwell.
    Gpu("A100", r"A100-SXM4?-80GB", (8, 0), 312, None, 19.5, 80, 2039, 300),
    Gpu("A100-40GB", r"A100-SXM4?-40GB", (8, 0), 312, None, 19.5, 40, 1555, 300),
    Gpu("A100-PCIe", r"A100 80GB PCIe", (8, 0), 312, None, 19.5, 80, 1935, 32),
    Gpu("A100-PCIe-40GB", r"A100-PCIE-40GB", (8, 0), 312, None, 19.5, 40, 1555, 32),
    Gpu("L40S", r"L40S", (8, 9), 362, 733, 91.6, 48, 864, 32),
    Gpu("RTX-4090", r"GeForce RTX 4090", (8, 9), 165.2, 330.3, 82.6, 24, 1008, 32),
    Gpu("RTX-5090", r"GeForce RTX 5090", (12, 0), 209.5, 419, 104.8, 32, 1792, 64),
    Gpu("H100", r"H100 (\d+GB HBM3|SXM5( \d+GB)?)", (9, 0), 989, 1979, 67, 80, 3350, 450),
    Gpu("H100-PCIe", r"H100 PCIe", (9, 0), 756, 1513, 51, 80, 2000, 64),
    Gpu("H100-NVL", r"H100 NVL", (9, 0), 835, 1671, 60, 94, 3900, 300),
    Gpu("H200", r"H200", (9, 0), 989, 1979, 67, 141, 4800, 450),
    Gpu("H200-NVL", r"H200 NVL", (9, 0), 835, 1671, 60, 141, 4800, 450),
    Gpu("GH200", r"GH200 (480GB|120GB)", (9, 0), 989, 1979, 67, 96, 4000, 450),
    Gpu("GH200-144GB", r"GH200 144G HBM3e", (9, 0), 989, 1979, 67, 144, 4900, 450),
    Gpu("B200", r"B200", (10, 0), 2250, 4500, 75, 180, 8000, 900),
    Gpu("GB200", r"GB200", (10, 0), 2500, 5000, 80, 186, 8000, 900),
)


def find_device(device_name: str) -> Gpu | None:
    """Return the GPU that PyTorch names so, or None if it is not in the table, or a slice of a GPU (MIG)."""
    name = device_name.removeprefix("NVIDIA ")
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.device, name)), None)


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name in the table, in upper or lower case, or by the name that PyTorch gives it.

    Raises:
        UserError: it is not in the table.
    """
    from lrnn.settings import name_hint  # here, because it imports pydantic, which the table does without

    for gpu in GPUS:
        if gpu.name.lower() == re.sub(r"[\s_-]+", "-", name.strip()).lower():
            return gpu
    found = find_device(name.strip())
    if found is None:
        raise UserError(f"--gpu {name} is not known; {name_hint(name, [gpu.name for gpu in GPUS], list_all=True)}")
    return found
