"""The properties of GPUs that the settings of kernels depend on: compute capability and shared memory per block."""

import functools
from typing import NamedTuple

import torch

KIB = 1024


class Architecture(NamedTuple):
    """A kind of GPU.

    Attributes:
        capability: CUDA compute capability.
        shared: bytes of shared memory that a block may have.
    """

    capability: tuple[int, int]
    shared: int

    @property
    def name(self) -> str:
        """The name as compilers write it, such as sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


# Those that kernels are compiled for. The sizes are those of NVIDIA's CUDA programming guide.
A100, ADA = Architecture((8, 0), 163 * KIB), Architecture((8, 9), 99 * KIB)
HOPPER, BLACKWELL = Architecture((9, 0), 227 * KIB), Architecture((10, 0), 227 * KIB)
RTX_BLACKWELL = Architecture((12, 0), 99 * KIB)
COMPILED = (A100, ADA, HOPPER, BLACKWELL, RTX_BLACKWELL)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """Return that of a device; Hopper for the CPU, as tests of launches need, and for GPUs that are not NVIDIA's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    return Architecture(torch.cuda.get_device_capability(device), shared)
