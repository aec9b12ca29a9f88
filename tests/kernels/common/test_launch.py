"""Test `launch` without a GPU: when it reuses a compiled kernel, and with which arguments."""

from types import SimpleNamespace

import pytest
import torch
from triton.compiler import CompiledKernel

from lrnn.kernels.common import launch as module
from lrnn.kernels.common.launch import launch
from lrnn.kernels.common.tiles import Tiles


class Compiled(CompiledKernel):
    def __init__(self):
        self.launches = []
        self.module = None  # nothing is loaded

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel as `triton.jit` makes them: `kernel[grid](...)` compiles and launches."""

    def __init__(self):
        self.fn = lambda: None
        self.arg_names = ["x", "n", "A", "B"]
        self.compiled = []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **constants):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return compile_and_launch


@pytest.fixture
def device(monkeypatch):
    current = SimpleNamespace(index=0)
    active = SimpleNamespace(get_current_device=lambda: current.index)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return current


GRID = (1, 2, 3)
x = torch.zeros(64, 64)


def test_the_compiled_kernel_is_launched_the_second_time(device):
    kernel, other = Kernel(), torch.ones(3)
    launch(kernel, GRID, x, 7, B=True, num_warps=4, A=64)
    launch(kernel, GRID, other, 9, B=True, num_warps=4, A=64)
    (compiled,) = kernel.compiled
    assert compiled.launches == [(GRID, (other, 9, 64, True))]  # the constants in the order of the kernel


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (x, None),
        (x, x.half()),
        (x, x.flatten()[1:]),  # not aligned to 16 bytes
        (x, Tiles(x, 16, 16)),
        (Tiles(x, 16, 16), Tiles(x, 16, 32)),
        (Tiles(x, 16, 16), Tiles(x.half(), 16, 16)),
        (3, 1),
        (3, 16),
        (3, 2**31),
        (3, 3.0),
    ],
)
def test_values_that_triton_specialises_on_compile_again(device, first, second):
    kernel = Kernel()
    for argument in (first, second):
        launch(kernel, GRID, argument, 7, A=1, B=2)
    assert len(kernel.compiled) == 2


def test_other_constants_and_devices_compile_again(device):
    kernel = Kernel()
    launch(kernel, GRID, x, 7, A=1, B=2)
    launch(kernel, GRID, x, 7, A=2, B=1)
    launch(kernel, GRID, x, 7, A=1, B=2, num_warps=8)
    device.index = 1
    launch(kernel, GRID, x, 7, A=1, B=2)
    assert len(kernel.compiled) == 4
    assert not any(compiled.launches for compiled in kernel.compiled)
