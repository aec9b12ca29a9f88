"""Settings of the kernels in plain Triton: by head size, dtype and GPU.

There is no autotuning: the same program runs on every rank and in every run, with settings that the tests have checked.

Shared memory decides them, of which Hopper has the most, and these are its settings but for the following.

| capability | KiB per block | differs from Hopper |
|---|---|---|
| 8.0, 8.7 | 163 | float32 with keys of 128: no pipelining and no segments; with keys of 256: none |
| 8.6, 8.9 | 99 | the same; float32 without tensor cores, with less per program; 16 bits with keys of 256: no segments |
| 10.x | 227 | float32: no pipelining, which would exceed the tensor memory (512 columns) |
| 12.x | 99 | float32, and scans with keys of 256: no pipelining |

Before Hopper there is no TMA. Tiles are loaded through registers, and each layout in which a product reads one is a
copy in shared memory. In float32 a product by tf32 takes two copies, one of the high and one of the low part.
"""

import functools
from typing import NamedTuple

import torch

from lrnn.kernels.common.architecture import ADA, Architecture
from lrnn.kernels.common.dtypes import dot_precision
from lrnn.kernels.delta_rule.cut import scan_columns

A100_SHARED, HOPPER_SHARED = 163 * 1024, 227 * 1024


class Launch(NamedTuple):
    """Settings of a kernel: columns of values per program, warps, and stages of the loop over chunks."""

    BV: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """Return them as `launch` takes them."""
        return {"BV": self.BV, "STAGES": self.stages, "num_warps": self.warps, "num_stages": self.stages}


class Settings(NamedTuple):
    """Settings of the kernels that differ among GPUs.

    Attributes:
        precision: `input_precision` of the products, which counts in float32 alone.
        forward_scan, backward_scan, inside_chunks: of `chunk_forward`, `scan_backward` and `chunk_backward`.
        cuts_sequences: whether few long sequences may be scanned in segments.
    """

    precision: str
    forward_scan: Launch
    backward_scan: Launch
    inside_chunks: Launch
    cuts_sequences: bool = True

    def without_pipelining(self) -> "Settings":
        """Return settings with one stage in both scans."""
        forward, backward = (launch._replace(stages=1) for launch in (self.forward_scan, self.backward_scan))
        return self._replace(forward_scan=forward, backward_scan=backward)


@functools.cache
def choose_settings(K: int, dtype: torch.dtype, gpu: Architecture) -> Settings:
    """Return the settings for keys of 64, 128 or 256 on a GPU.

    Raises:
        ValueError: the GPU has no kernels for this dtype and size of keys. The message says what it has.
    """
    major, wide, settings = gpu.capability[0], dtype == torch.float32, _on_hopper(K, dtype)
    if major < 8 or gpu.shared < ADA.shared:
        raise ValueError(
            f"the delta-rule kernels take a GPU of compute capability 8.0 or above with {ADA.shared // 1024} KiB of "
            f"shared memory per block; this one ({gpu.name}) has {gpu.shared // 1024}"
        )
    if major == 9 and gpu.shared >= HOPPER_SHARED:
        return settings
    if gpu.shared >= HOPPER_SHARED and major > 9:
        return settings.without_pipelining() if wide else settings
    if major > 9:
        return settings.without_pipelining() if wide or K == 256 else settings
    return _before_hopper(K, dtype, gpu, settings)


def _on_hopper(K: int, dtype: torch.dtype) -> Settings:
    wide, BV = dtype == torch.float32, scan_columns(K, dtype)
    if K == 256:
        forward = Launch(BV, warps=4, stages=1) if wide else Launch(BV, warps=8, stages=2)
    else:
        forward = Launch(BV, warps=4, stages=2)
    if wide:
        inside = Launch(BV=32, warps=8, stages=1)
    else:
        inside = Launch(BV=32, warps=4, stages=3) if K < 256 else Launch(BV=32, warps=8, stages=2)
    return Settings(
        dot_precision(dtype),
        forward_scan=forward,
        # Two stages with keys of 256 would exceed the shared memory.
        backward_scan=forward._replace(stages=1) if K == 256 else forward,
        inside_chunks=inside,
    )


def _before_hopper(K: int, dtype: torch.dtype, gpu: Architecture, settings: Settings) -> Settings:
    small = gpu.shared < A100_SHARED
    if dtype != torch.float32:
        return settings._replace(cuts_sequences=not (small and K == 256))
    if K == 256:
        raise ValueError(
            f"the delta-rule kernels do not fit into the {gpu.shared // 1024} KiB of shared memory per block that "
            f"this GPU ({gpu.name}) has, in float32 with keys of more than 128; use bfloat16 or float16, or heads of "
            "up to 128"
        )
    if small:
        launch = Launch(BV=32, warps=8, stages=1)
        settings = settings._replace(precision="ieee", forward_scan=launch, backward_scan=launch)
    elif K == 128:
        settings = settings.without_pipelining()
    return settings._replace(cuts_sequences=K == 64)
