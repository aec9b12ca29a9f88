"""Mocks of the names that kernels import from Gluon, and the launch of a kernel in a module that was run with them."""

import builtins
import dataclasses
import importlib.util
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from lrnn.kernels.common.tiles import Tiles

from .scheduler import Barrier, Barriers, Operation, Scheduler
from .values import Descriptor, Memory, Pointer, Product, Tensor, as_float, plain

Changes = Sequence[tuple[str, str]]


def launch_on_cpu(
    kernel: Any, grid: tuple[int, int, int], *args: Any, seed: int = 0, changes: Changes = (), **constants: Any
) -> None:
    """Do what `lrnn.kernels.common.launch.launch` does, for a kernel in Gluon and tensors on the CPU.

    Args:
        seed: seed of the order in which things happen.
        changes: replacements in the source of the kernel's module, by texts that each appear there once.

    Raises:
        AssertionError: If a check fails. `Deadlock` is one.
    """
    assert grid[1:] == (1, 1)
    machine = _Machine(Scheduler(random.Random(seed), grid[0]))
    function = machine.load_module(kernel.fn.__module__, changes)[kernel.fn.__name__]
    mocks = [_as_argument(x) for x in args]
    known = {name: x for name, x in constants.items() if name in kernel.arg_names}
    assert constants.keys() - known.keys() <= {"num_warps", "num_stages"}
    for program in range(grid[0]):
        machine.scheduler.run_program(program, lambda: function(*mocks, **known))


def _as_argument(x: Any) -> Any:
    if isinstance(x, Tiles):
        return Descriptor(x)
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if isinstance(x, float):
        return Tensor(torch.tensor(x, dtype=torch.float32))
    return Tensor(torch.tensor(x, dtype=torch.int32)) if isinstance(x, int) else x


class _Machine:
    """Mock Gluon's functions for the program that the scheduler runs."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.loaded: dict[str, dict[str, Any]] = {}
        self.modules = self._modules()

    # Modules whose imports from Gluon are mocks

    def load_module(self, name: str, changes: Changes = ()) -> dict[str, Any]:
        """Run a module of kernels in Gluon again with the mocks, and return its names."""
        if name not in self.loaded:
            path = importlib.util.find_spec(name).origin
            text = Path(path).read_text()
            for old, new in changes:
                assert text.count(old) == 1, f"{text.count(old)} times in {path}: {old}"
                text = text.replace(old, new)
            names = {"__name__": name, "__builtins__": {**vars(builtins), "__import__": self._import}}
            exec(compile(text, path, "exec"), names)
            self.loaded[name] = names
        return self.loaded[name]

    def _import(self, name: str, *args: Any) -> Any:
        if name in self.modules:
            return self.modules[name]
        if name.startswith("lrnn.kernels.") and "@gluon.jit" in Path(importlib.util.find_spec(name).origin).read_text():
            return SimpleNamespace(**self.load_module(name))
        return __import__(name, *args)

    def _modules(self) -> dict[str, SimpleNamespace]:
        language = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")},
            **dict.fromkeys(
                ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"),
                lambda *a: None,
            ),
            constexpr=tl.constexpr,
            tensor=Tensor,
            shared_memory_descriptor=Memory,
            static_range=range,
            program_id=lambda axis: Tensor(torch.tensor(self.scheduler.program, dtype=torch.int32)),
            num_programs=lambda axis: Tensor(torch.tensor(self.scheduler.programs, dtype=torch.int32)),
            arange=lambda start, end, layout: Tensor(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout: Tensor(torch.full(shape, value, dtype=dtype)),
            convert_layout=lambda x, layout: x,
            permute=lambda x, order: Tensor(x.values.permute(order)),
            join=lambda x, y: Tensor(torch.stack([x.values, y.values], -1)),
            where=_where,
            **{name: _of_float(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2")},
            abs=lambda x: Tensor(x.values.abs()),
            maximum=lambda x, y: Tensor(torch.maximum(as_float(x), as_float(y))),
            sum=lambda x, axis: Tensor(x.values.sum(axis)),
            max=lambda x, axis: Tensor(x.values.amax(axis)),
            min=lambda x, axis: Tensor(x.values.amin(axis)),
            associative_scan=_scan,
            load=lambda pointer: pointer.load(),
            store=lambda pointer, value, mask=None: pointer.store(value, mask),
            barrier=lambda: self.scheduler.step("the part's barrier"),
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
        )
        gluon = SimpleNamespace(
            language=language,
            jit=lambda f=None, **options: f or (lambda g: g),
            aggregate=dataclasses.dataclass(frozen=True, eq=False),  # fields by position or by name; they do not change
        )
        hopper = SimpleNamespace(
            fence_async_shared=self.fence,
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.initialise(count),
                invalidate=lambda barrier: barrier.invalidate(),
                expect=self.expect,
                arrive=self.arrive,
                wait=lambda barrier, phase: self.scheduler.wait_for_barrier(barrier, operator.index(phase)),
            ),
            tma=SimpleNamespace(
                tensor_descriptor=Descriptor,
                async_load=self.begin_load,
                async_store=self.begin_store,
                store_wait=self.wait_stores,
            ),
            warpgroup_mma=self.begin_product,
            warpgroup_mma_wait=self.wait_products,
        )
        return {
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language": language,
            "triton.experimental.gluon.language.nvidia.ampere": SimpleNamespace(mma_v2=_multiply),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
        }

    # Parts and memory

    def warp_specialize(self, parts: Sequence[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(parts) - 1, "the first part is given neither warps nor registers"
        started = [
            self.scheduler.start(f"part {i}, {function.__name__}", lambda function=function, args=args: function(*args))
            for i, (function, args) in enumerate(parts)
        ]
        self.scheduler.step("the end of all parts", lambda: all(part.ended for part in started))

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory | Barriers | Barrier:
        if dtype != torch.int64:
            return Memory.allocate(self.scheduler, dtype, shape)
        barriers = self.scheduler.allocate_barriers(shape[0])
        return barriers if len(shape) == 2 else barriers.index(0)

    def fence(self) -> None:
        for unfenced in self.scheduler.current.unfenced:
            unfenced.fill_(False)
        self.scheduler.current.unfenced.clear()

    # Barriers

    def expect(self, barrier: Barrier, size: int) -> None:
        self.scheduler.step("a turn to expect")
        barrier.bytes += size
        barrier.arrive(1)

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        self.scheduler.step("a turn to arrive")
        if pred:
            barrier.arrive(count)

    # Copies

    def begin_load(self, descriptor: Descriptor, at: Sequence[Any], barrier: Barrier, result: Memory) -> None:
        self.scheduler.step("a turn to copy")
        (part, places), size = descriptor.inside(at), descriptor.block_type.nbytes
        assert result.dtype == part.dtype and result.values.nbytes == size
        result.check_unused()
        result.check_fenced()
        result.values.fill_(torch.nan)
        result.users += 1

        def finish() -> None:
            tile = part.new_zeros(descriptor.block_shape)
            tile[places] = part
            result.values.copy_(tile.reshape(result.shape))
            result.users -= 1
            barrier.receive(size)

        self.scheduler.loads.append(Operation("load", finish))

    def begin_store(self, descriptor: Descriptor, at: Sequence[Any], source: Memory) -> None:
        self.scheduler.step("a turn to copy")
        part, places = descriptor.inside(at)
        assert source.dtype == part.dtype and [*source.shape] == descriptor.block_shape
        release = _use([source])
        self.scheduler.current.copies.append(Operation("store", lambda: part.copy_(source.read()[places]), release))

    def wait_stores(self, pending: int) -> None:
        self.scheduler.wait_for_operations(self.scheduler.current.copies, pending)

    # Products

    def begin_product(
        self, a: Tensor | Memory, b: Memory, acc: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Tensor:
        self.scheduler.step("a turn to multiply")
        assert a.dtype == b.dtype and a.shape[1] == b.shape[0], (a.dtype, b.dtype, a.shape, b.shape)
        result = Product(torch.Size((a.shape[0], b.shape[1])))
        assert acc._values.shape == result._values.shape and acc._values.dtype == torch.float32
        release_operands = _use([x for x in (a, b) if isinstance(x, Memory)])

        def finish() -> None:
            left = a.read() if isinstance(a, Memory) else a.values
            product = left.double() @ b.read().double()
            if use_acc:
                product += acc._values.double()
            result._values.copy_(product)

        def release() -> None:
            release_operands()
            result.waited_for = True

        self.scheduler.current.products.append(Operation("product", finish, release))
        return result if is_async else self.wait_products(0, [result])

    def wait_products(self, pending: int, deps: Iterable[Tensor]) -> Any:
        self.scheduler.wait_for_operations(self.scheduler.current.products, pending)
        results = tuple(deps)
        return results[0] if len(results) == 1 else results


def _use(memories: list[Memory]) -> Callable[[], None]:
    # an asynchronous operation reads them until the returned function is called
    for memory in memories:
        memory.read()
        memory.check_fenced()
        memory.users += 1

    def release() -> None:
        for memory in memories:
            memory.users -= 1

    return release


def _multiply(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    assert a.dtype == b.dtype and acc.dtype == torch.float32
    return Tensor((a.values.double() @ b.values.double() + acc.values.double()).float())


def _where(mask: Tensor, x: Any, y: Any) -> Tensor:
    x, y = plain(x), plain(y)
    both = [z for z in (x, y) if isinstance(z, torch.Tensor)]
    dtype = both[0].dtype if both else None
    return Tensor(torch.where(mask.values, torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)))


def _of_float(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Tensor]:
    return lambda x: Tensor(function(as_float(x)))


def _scan(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    found = [Tensor(x.values.select(axis, 0))]
    for i in range(1, x.shape[axis]):
        found.append(combine(found[-1], Tensor(x.values.select(axis, i))))
    return Tensor(torch.stack([y.values for y in found], axis))
