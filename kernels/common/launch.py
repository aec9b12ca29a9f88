"""Launches of Triton kernels that cost the host little.

A launch by `kernel[grid](...)` binds and specialises every argument again, constants included. That takes longer than
many kernels run. Here the compiled kernel is looked up by what Triton would specialise on, and is launched directly.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import driver

from lrnn.kernels.common.dispatch import INTERPRETED
from lrnn.kernels.common.tiles import GluonTiles, Tiles

# Compiled kernels with the values of their constants, in the order of the kernel.
_compiled: dict[tuple, tuple[CompiledKernel, tuple]] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Do what `kernel[grid](*args, **constants)` does, on the current device.

    Args:
        kernel: a function under `triton.jit` or `gluon.jit`, which takes its constants (`tl.constexpr`) last.
        args: every other argument: tensors, `Tiles`, integers, floats, None, or tuples of these.
        constants: every constant, and `num_warps` and `num_stages` unless they are Triton's own.
    """
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    key = (kernel.fn, driver.active.get_current_device(), *map(_specialization, args), *constants.items())
    found = _compiled.get(key)
    if found is None:
        if isinstance(kernel, GluonJITFunction):
            args = tuple(GluonTiles(x) if isinstance(x, Tiles) else x for x in args)
        compiled = kernel[grid](*args, **constants)
        if isinstance(compiled, CompiledKernel):
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, values = found
    compiled[grid](*args, *values)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors, or an H100's for the CPU, as tests of launches need."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _specialization(x: Any) -> Any:
    """Return a value that is equal for arguments that the same compiled kernel may be given."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if isinstance(x, Tiles):
        return x.kind
    if isinstance(x, tuple):
        return tuple(map(_specialization, x))
    if isinstance(x, int):
        # Finer than Triton's own rule for an argument under `do_not_specialize`, which looks at the width alone.
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
    return type(x)
