"""Fixed launch settings of the chunkwise kernels, and the assembler that they need.

There is no autotuning: the same program runs on every rank and in every run, and each setting here is one that the
tests have checked. On Hopper, ptxas before 13.3 can miscompile a wgmma whose left operand lies in registers
(github.com/triton-lang/triton/issues/9433), which is what these kernels are made of.
"""

import functools
import re
import subprocess
import warnings
from typing import NamedTuple

import torch
import triton

HEAD_SIZES = (64, 128, 256)
SAFE_PTXAS = (13, 3)


class Launch(NamedTuple):
    """Columns of values of a program, warps, and stages of the loop over chunks."""

    BV: int
    warps: int
    stages: int


INVERSE_LAUNCH = {"num_warps": 1, "num_stages": 3}  # of `chunk_inverse`: its blocks of 16 x 16 are a warp's work


def scan_launch(K: int, dtype: torch.dtype) -> Launch:
    """Settings of `chunk_forward` and `chunk_scan_backward`: 64 columns fill one warpgroup's rows."""
    if dtype == torch.float32:
        return Launch(BV=64, warps=4, stages=2) if K < 256 else Launch(BV=32, warps=4, stages=1)
    if K == 256:
        return Launch(BV=64, warps=8, stages=2)
    return Launch(BV=64, warps=4, stages=2)


def scan_backward_stages(K: int, dtype: torch.dtype) -> int:
    """Stages of `chunk_scan_backward`; with keys of 256 two would exceed the shared memory."""
    return 1 if K == 256 else scan_launch(K, dtype).stages


def chunk_launch(K: int, dtype: torch.dtype) -> Launch:
    """Settings of `chunk_backward`."""
    if dtype == torch.float32:
        return Launch(BV=32, warps=8, stages=1)
    return Launch(BV=32, warps=4, stages=3) if K < 256 else Launch(BV=32, warps=8, stages=2)


def recurrent_launch(K: int) -> dict[str, int]:
    """Settings of `recurrent`: a program holds K x BV numbers of the state in registers."""
    return {"BV": 32 if K <= 128 else 16, "num_warps": 4}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where there is none, as in tests of what is launched."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def ptxas_version(arch: int = 90) -> tuple[int, int]:
    """Version of the assembler that Triton uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(arch).path
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"{path} --version does not tell a release: {text!r}")
    return int(found[1]), int(found[2])


@functools.cache
def check_assembler(device: torch.device) -> None:
    """Warn, once, where Triton would use a ptxas that is known to miscompile kernels of this kind."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != 9:
        return
    version = ptxas_version()
    if version < SAFE_PTXAS:
        warnings.warn(
            f"Triton {triton.__version__} assembles for Hopper with ptxas {version[0]}.{version[1]}; before "
            f"{SAFE_PTXAS[0]}.{SAFE_PTXAS[1]} it can miscompile wgmma with operands in registers. Use Triton 3.9 or "
            "newer, or `pip install 'nvidia-cuda-nvcc>=13.3'` and set TRITON_PTXAS_PATH to its bin/ptxas "
            "(.../site-packages/nvidia/cu13/bin/ptxas; it needs a driver of 580 or newer).",
            stacklevel=2,
        )
