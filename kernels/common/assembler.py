"""The assembler (ptxas) that Triton uses, and a warning about versions that miscompile.

On Hopper, ptxas before 13.3 can miscompile a wgmma whose left operand lies in registers
(github.com/triton-lang/triton/issues/9433). The delta-rule kernels consist of such products.
"""

import functools
import re
import subprocess
import warnings

import torch
import triton

SAFE_PTXAS = (13, 3)


@functools.cache
def ptxas_version(arch: int = 90) -> tuple[int, int]:
    """Return the version of the assembler that Triton uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(arch).path
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"{path} --version names no release: {text!r}")
    return int(found[1]), int(found[2])


@functools.cache
def check_assembler(device: torch.device) -> None:
    """Warn once if Triton would use a ptxas that is known to miscompile kernels of this kind."""
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
