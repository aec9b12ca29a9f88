"""Kernels in Gluon on a CPU: the source of a kernel runs as Python, on mocks of what it imports from Gluon.

Triton's interpreter knows no Gluon. `launch_on_cpu` takes the place of `lrnn.kernels.launch.launch` instead. Each part
of `gl.warp_specialize` is a thread, of which one runs at a time: at every access to shared memory, every barrier and
every asynchronous operation it hands over to a scheduler, which lets a random one go on or ends a random operation of
those under way. The order depends on the seed alone, not on the machine or its load. No time is taken, and none waited
for: where nothing can go on, that is a deadlock. What is slow by chance in a run stays so, so that a part lags far
behind, or copies and products end as late as the barriers allow. Checked are:

* Shared memory is not a number until it is written, and from the start of a copy into it to its end: nobody may read it
  then. Who reads too early or too late finds this, or wrong numbers.
* Nobody writes where a product or a copy may still read: until the part that began it has waited for its end.
* Products and copies read what was stored by threads only after a fence of the part that stored it.
* The result of a product is not used before it was waited for; at its end a part has waited for all that it began.
* A barrier gets no more arrivals in a phase than its count, and no more bytes than were expected. With fewer, or with a
  parity in the wrong order, somebody waits for ever: a `Deadlock`, which tells who waits and in which line.
* Copies lie inside their matrix, loads and stores by pointers inside their tensor; shapes and element types fit.

Not seen: what warps of a part do to each other (a part is one thread, `gl.barrier` does nothing), layouts, registers,
the size of shared memory, the order of sums, and races that show in no order that was tried. Sixteen bits are not
needed: with float32 for every matrix the results are those of the equations, to float32's precision.
"""

import builtins
import importlib.util
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from lrnn.kernels.tiles import Tiles

Changes = Sequence[tuple[str, str]]


class Deadlock(AssertionError):
    """Nothing can go on, and not all parts have ended."""


class _Stopped(BaseException):
    """Ends the thread of a part after a failure elsewhere."""


def launch_on_cpu(
    kernel: Any, grid: tuple[int, int, int], *args: Any, seed: int = 0, changes: Changes = (), **constants: Any
) -> None:
    """`lrnn.kernels.launch.launch` for a kernel in Gluon and tensors on the CPU.

    Args:
        seed: of the order in which things happen.
        changes: texts of the kernel's module, each of which stands there once, and what is run instead.

    Raises:
        AssertionError: a check failed; `Deadlock` is one.
    """
    machine = _Machine(random.Random(seed), grid[0])
    assert grid[1:] == (1, 1)
    function = machine.load(kernel.fn.__module__, changes)[kernel.fn.__name__]
    mocks = [_as_argument(machine, x) for x in args]
    known = {name: x for name, x in constants.items() if name in kernel.arg_names}
    assert constants.keys() - known.keys() <= {"num_warps", "num_stages"}
    for program in range(grid[0]):
        machine.run_program(program, lambda: function(*mocks, **known))


def _as_argument(machine: "_Machine", x: Any) -> Any:
    if isinstance(x, Tiles):
        return _Descriptor(x)
    return _Pointer(x) if isinstance(x, torch.Tensor) else x


def _plain(x: Any) -> Any:
    # an operand of torch
    if isinstance(x, _Tensor):
        return x.values
    return x.value if isinstance(x, tl.constexpr) else x


class _Tensor:
    """A tensor in registers, or a number that the kernel computes with."""

    def __init__(self, values: torch.Tensor):
        self._values = values

    @property
    def values(self) -> torch.Tensor:
        return self._values

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "_Tensor":
        return _Tensor(self.values.view(dtype) if bitcast else self.values.to(dtype))

    def __getitem__(self, key: Any) -> "_Tensor":
        return _Tensor(self.values[key])

    def __neg__(self) -> "_Tensor":
        return _Tensor(-self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __index__(self) -> int:
        return operator.index(self.values.item())


def _add_operators() -> None:
    def forward(function: Callable) -> Callable:
        return lambda self, other: _Tensor(function(self.values, _plain(other)))

    def reflected(function: Callable) -> Callable:
        return lambda self, other: _Tensor(torch.as_tensor(function(_plain(other), self.values)))

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or"):
        function = getattr(operator, f"__{name}__")
        setattr(_Tensor, f"__{name}__", forward(function))
        setattr(_Tensor, f"__r{name}__", reflected(function))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(_Tensor, f"__{name}__", forward(getattr(operator, name)))


_add_operators()


class _Operation:
    """Something under way: what it does at its end, and the memory that it reads until its part has waited for it."""

    def __init__(self, kind: str, finish: Callable[[], None], reads: "Sequence[_Memory]" = ()):
        self.kind, self.finish, self.reads = kind, finish, reads
        self.done = False
        for memory in reads:
            memory.users += 1

    def release(self) -> None:
        for memory in self.reads:
            memory.users -= 1


class _Product(_Tensor):
    """The result of `warpgroup_mma`, of no use but to be added to until it has been waited for."""

    def __init__(self, shape: torch.Size):
        super().__init__(torch.empty(shape))
        self.product: torch.Tensor | None = None  # once it is computed
        self.waited_for = False

    @property
    def values(self) -> torch.Tensor:
        assert self.waited_for, "a product is used before it was waited for"
        return self._values


class _Memory:
    """A view of shared memory: its values, how many operations use each (`users`), and which of them were stored by
    threads and not fenced since (`unfenced`)."""

    def __init__(self, machine: "_Machine", values: torch.Tensor, users: torch.Tensor, unfenced: torch.Tensor):
        self.machine, self.values, self.users, self.unfenced = machine, values, users, unfenced

    def _view(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "_Memory":
        return _Memory(self.machine, *map(function, (self.values, self.users, self.unfenced)))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def index(self, i: Any) -> "_Memory":
        return self._view(lambda x: x[operator.index(_plain(i))])

    def slice(self, start: int, length: int, dim: int = 0) -> "_Memory":
        return self._view(lambda x: x.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "_Memory":
        return self._view(lambda x: x.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "_Memory":
        assert dtype == self.dtype
        return self._view(lambda x: x.view(shape))

    def load(self, layout: Any) -> _Tensor:
        self.machine.step("a load")
        return _Tensor(self.read().clone())

    def store(self, value: _Tensor) -> None:
        self.machine.step("a store")
        assert value.shape == self.shape and value.dtype == self.dtype, (value.shape, value.dtype, self.shape)
        self.check_unused()
        self.values.copy_(value.values)
        self.unfenced.fill_(True)
        self.machine.current.stored.append(self)

    def read(self) -> torch.Tensor:
        assert not self.values.isnan().any(), "shared memory is read before it is there"
        return self.values

    def check_unused(self) -> None:
        assert not self.users.any(), "shared memory is written that a product or a copy may still use"

    def check_fenced(self) -> None:
        assert not self.unfenced.any(), "a product or a copy reads what was stored without a fence"


class _Barrier:
    """An mbarrier: a count of arrivals and of bytes to come; its phase ends when none is missing."""

    def __init__(self, label: str):
        self.label = label
        self.count, self.missing, self.bytes, self.parity = 0, 0, 0, 0

    def arrive(self, count: int) -> None:
        assert self.count, "a barrier is used that was not initialised"
        self.missing -= count
        assert self.missing >= 0, f"{self.label}: more arrivals than its count of {self.count}"
        self._end_phase()

    def receive(self, size: int) -> None:
        self.bytes -= size
        assert self.bytes >= 0, f"{self.label}: more bytes came than were expected"
        self._end_phase()

    def _end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.count

    def __str__(self) -> str:
        return f"{self.label} (parity {self.parity}, {self.missing} arrivals and {self.bytes} bytes missing)"


class _Barriers:
    """Barriers in shared memory."""

    def __init__(self, number: int, count: int):
        self.barriers = [_Barrier(f"barrier {i} of allocation {number}") for i in range(count)]

    def index(self, i: Any) -> _Barrier:
        return self.barriers[operator.index(_plain(i))]


class _Descriptor:
    """Tiles of a matrix."""

    def __init__(self, tiles: Tiles):
        self.matrix = tiles.base.as_strided(tiles.shape, tiles.strides)
        self.block_shape = tiles.block_shape
        self.dtype, self.layout = tiles.base.dtype, None
        rows, columns = tiles.block_shape
        self.block_type = SimpleNamespace(nbytes=rows * columns * tiles.base.element_size())

    def tile(self, at: Sequence[Any]) -> torch.Tensor:
        tile = self.matrix
        for dim, (start, length) in enumerate(zip(at, self.block_shape, strict=True)):
            start = operator.index(_plain(start))
            assert 0 <= start <= tile.shape[dim] - length, f"a tile from {start} on is outside {self.matrix.shape}"
            tile = tile.narrow(dim, start, length)
        return tile


class _Pointer:
    """A pointer into a tensor, or a tensor of pointers."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0):
        assert tensor.is_contiguous()
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> "_Pointer":
        return _Pointer(self.tensor, self.offset + _plain(offset))

    def places(self) -> torch.Tensor:
        places = torch.as_tensor(self.offset).long()
        assert (places >= 0).all() and (places < self.tensor.numel()).all(), "a pointer is outside its tensor"
        return places


class _Part:
    """A part of a program: a thread that runs when the scheduler says so."""

    def __init__(self, machine: "_Machine", name: str, function: Callable[[], None]):
        self.machine, self.name, self.function = machine, name, function
        self.turn = threading.Semaphore(0)
        self.may_go_on: Callable[[], bool] = lambda: True
        self.what = "its start"
        self.ended = False
        self.error: BaseException | None = None
        self.products: list[_Operation] = []  # begun and not waited for, in order
        self.copies: list[_Operation] = []  # out of shared memory, likewise
        self.stored: list[_Memory] = []  # not fenced
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.turn.acquire()
        try:
            if not self.machine.stopping:
                self.function()
                assert not self.products, "a part ends before its last product"
                assert not self.copies, "a part ends before its last copy has read shared memory"
        except _Stopped:
            pass
        except BaseException as error:
            error.add_note(f"in {self.name}")
            self.error = error
        self.ended = True
        self.machine.baton.release()

    def where(self) -> str:
        # lines of the kernel in which it stands, from the inside out
        frame, lines = sys._current_frames().get(self.thread.ident or 0), []
        while frame is not None:
            if Path(frame.f_code.co_filename).parent.name == "kernels":
                lines.append(f"line {frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        return ", ".join(lines)


class _Machine:
    """The scheduler, and what kernels import from Gluon."""

    def __init__(self, chance: random.Random, programs: int):
        self.chance, self.programs, self.program = chance, programs, 0
        self.baton = threading.Semaphore(0)
        self.parts: list[_Part] = []
        self.loads: list[_Operation] = []  # copies into shared memory under way
        self.barriers: list[_Barriers] = []
        self.stopping = False
        self.weights: dict[Any, float] = {}
        self.current: _Part
        self.loaded: dict[str, dict[str, Any]] = {}
        self.modules = self._modules()

    # Modules whose imports from Gluon are mocks

    def load(self, name: str, changes: Changes = ()) -> dict[str, Any]:
        """The names of a module of kernels in Gluon, run anew."""
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
            return SimpleNamespace(**self.load(name))
        return __import__(name, *args)

    def _modules(self) -> dict[str, SimpleNamespace]:
        language = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int32", "int64")},
            **dict.fromkeys(
                ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"),
                lambda *a: None,
            ),
            constexpr=tl.constexpr,
            static_range=range,
            program_id=lambda axis: _Tensor(torch.tensor(self.program, dtype=torch.int32)),
            num_programs=lambda axis: _Tensor(torch.tensor(self.programs, dtype=torch.int32)),
            arange=lambda start, end, layout: _Tensor(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: _Tensor(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout: _Tensor(torch.full(shape, value, dtype=dtype)),
            convert_layout=lambda x, layout: x,
            where=_where,
            exp2=lambda x: _Tensor(torch.exp2(_as_float(x))),
            log2=lambda x: _Tensor(torch.log2(_as_float(x))),
            abs=lambda x: _Tensor(x.values.abs()),
            maximum=lambda x, y: _Tensor(torch.maximum(_as_float(x), _as_float(y))),
            sum=lambda x, axis: _Tensor(x.values.sum(axis)),
            max=lambda x, axis: _Tensor(x.values.amax(axis)),
            load=self.load_from_pointers,
            store=self.store_to_pointers,
            barrier=lambda: self.step("the part's barrier"),
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
        )
        gluon = SimpleNamespace(language=language, jit=lambda f=None, **options: f or (lambda g: g))
        hopper = SimpleNamespace(
            fence_async_shared=self.fence,
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=self.init_barrier,
                expect=self.expect,
                arrive=self.arrive,
                wait=self.wait_barrier,
            ),
            tma=SimpleNamespace(async_load=self.begin_load, async_store=self.begin_store, store_wait=self.wait_stores),
            warpgroup_mma=self.begin_product,
            warpgroup_mma_wait=self.wait_products,
        )
        return {
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language": language,
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
        }

    # The scheduler

    def run_program(self, program: int, function: Callable[[], None]) -> None:
        self.program, self.stopping = program, False
        self.parts, self.loads, self.barriers, self.weights = [], [], [], {}
        self._start("the kernel", function)
        try:
            while not all(part.ended for part in self.parts):
                self._go_on()
            assert not self.loads, "a program ends before a copy into its shared memory"
            for barrier in (b for group in self.barriers for b in group.barriers):
                assert barrier.bytes == 0, f"at the end of a program: {barrier}"
        except BaseException as error:
            error.add_note(f"in program {program} of {self.programs}")
            raise
        finally:
            self.stopping = True
            for part in self.parts:
                part.turn.release()
            for part in self.parts:
                part.thread.join()

    def _go_on(self) -> None:
        # one part up to its next step, or the end of one operation
        choices: list[_Part | _Operation] = []
        weights: list[float] = []

        def add(choice: _Part | _Operation, kind: Any) -> None:
            if kind not in self.weights:
                self.weights[kind] = self.chance.choice((1, 1 / 16, 1 / 256))
            choices.append(choice)
            weights.append(self.weights[kind])

        for number, part in enumerate(self.parts):
            if not part.ended and part.may_go_on():
                add(part, number)
            first = next((x for x in part.products if not x.done), None)  # products of a part end in order
            if first is not None:
                add(first, (number, first.kind))
            for x in part.copies:
                if not x.done:
                    add(x, (number, x.kind))
        for x in self.loads:
            add(x, x.kind)
        if not choices:
            waiting = "\n".join(f"{p.name} waits for {p.what}: {p.where()}" for p in self.parts if not p.ended)
            raise Deadlock(f"deadlock:\n{waiting}")
        choice = self.chance.choices(choices, weights)[0]
        if isinstance(choice, _Operation):
            choice.finish()
            choice.done = True
            if choice in self.loads:
                self.loads.remove(choice)
            return
        self.current = choice
        choice.turn.release()
        self.baton.acquire()
        if choice.error is not None:
            raise choice.error

    def _start(self, name: str, function: Callable[[], None]) -> _Part:
        self.parts.append(_Part(self, name, function))
        return self.parts[-1]

    def step(self, what: Any, may_go_on: Callable[[], bool] = lambda: True) -> None:
        """Called by a part: others may do something now, and must until `may_go_on`."""
        part = self.current
        part.what, part.may_go_on = what, may_go_on
        self.baton.release()
        part.turn.acquire()
        if self.stopping:
            raise _Stopped

    def warp_specialize(self, parts: Sequence[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        assert len(warps) == len(registers) == len(parts) - 1, "the first part is given neither warps nor registers"
        started = [
            self._start(f"part {i}, {function.__name__}", lambda function=function, args=args: function(*args))
            for i, (function, args) in enumerate(parts)
        ]
        self.step("the end of all parts", lambda: all(part.ended for part in started))

    # Memory

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "_Memory | _Barriers":
        if dtype == torch.int64:
            self.barriers.append(_Barriers(len(self.barriers), shape[0]))
            return self.barriers[-1]
        values = torch.full(shape, torch.nan, dtype=dtype)
        return _Memory(self, values, torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.bool))

    def load_from_pointers(self, pointer: _Pointer) -> _Tensor:
        return _Tensor(pointer.tensor.view(-1)[pointer.places()])

    def store_to_pointers(self, pointer: _Pointer, value: _Tensor) -> None:
        places = pointer.places()
        assert places.shape == value.shape
        pointer.tensor.view(-1)[places] = value.values.to(pointer.tensor.dtype)

    def fence(self) -> None:
        for memory in self.current.stored:
            memory.unfenced.fill_(False)
        self.current.stored.clear()

    # Barriers

    def init_barrier(self, barrier: _Barrier, count: int) -> None:
        assert barrier.count == 0, f"{barrier} is initialised twice"
        barrier.count = barrier.missing = count

    def expect(self, barrier: _Barrier, size: int) -> None:
        self.step("a turn to expect")
        barrier.bytes += size
        barrier.arrive(1)

    def arrive(self, barrier: _Barrier, count: int = 1, pred: Any = True) -> None:
        self.step("a turn to arrive")
        if pred:
            barrier.arrive(count)

    def wait_barrier(self, barrier: _Barrier, phase: Any) -> None:
        parity = operator.index(_plain(phase))
        assert parity in (0, 1)
        # The phase of this parity is over while the barrier is in one of the other.
        self.step(_Waiting(barrier, parity), lambda: barrier.parity != parity)

    # Copies

    def begin_load(self, descriptor: _Descriptor, at: Sequence[Any], barrier: _Barrier, result: _Memory) -> None:
        self.step("a turn to copy")
        tile, size = descriptor.tile(at), descriptor.block_type.nbytes
        assert result.dtype == tile.dtype and result.values.numel() == tile.numel()
        result.check_unused()
        result.check_fenced()
        result.values.fill_(torch.nan)
        result.users += 1

        def finish() -> None:
            result.values.copy_(tile.reshape(result.shape))
            result.users -= 1
            barrier.receive(size)

        self.loads.append(_Operation("load", finish))

    def begin_store(self, descriptor: _Descriptor, at: Sequence[Any], source: _Memory) -> None:
        self.step("a turn to copy")
        tile = descriptor.tile(at)
        assert source.dtype == tile.dtype and source.shape == tile.shape, (source.shape, tile.shape)
        source.read()
        source.check_fenced()
        self.current.copies.append(_Operation("store", lambda: tile.copy_(source.read()), [source]))

    def wait_stores(self, pending: int) -> None:
        self._wait(self.current.copies, pending)

    def _wait(self, operations: list[_Operation], pending: int) -> None:
        over = operations[: max(0, len(operations) - pending)]
        self.step("its products or copies", lambda: all(x.done for x in over))
        for x in over:
            x.release()
        del operations[: len(over)]

    # Products

    def begin_product(
        self, a: "_Tensor | _Memory", b: _Memory, acc: _Tensor, use_acc: bool = True, is_async: bool = False
    ) -> _Tensor:
        self.step("a turn to multiply")
        assert a.dtype == b.dtype and a.shape[1] == b.shape[0], (a.dtype, b.dtype, a.shape, b.shape)
        result = _Product(torch.Size((a.shape[0], b.shape[1])))
        assert acc._values.shape == result._values.shape and acc._values.dtype == torch.float32
        reads = [x for x in (a, b) if isinstance(x, _Memory)]
        for x in reads:
            x.read()
            x.check_fenced()

        def finish() -> None:
            left = a.read() if isinstance(a, _Memory) else a.values
            product = left.double() @ b.read().double()
            if use_acc:
                product += acc._values.double()
            result._values.copy_(product)

        operation = _Operation("product", finish, reads)
        operation.result = result
        self.current.products.append(operation)
        return result if is_async else self.wait_products(0, [result])

    def wait_products(self, pending: int, deps: Iterable[_Tensor]) -> Any:
        products = self.current.products
        over = products[: max(0, len(products) - pending)]
        self._wait(products, pending)
        for x in over:
            x.result.waited_for = True
        results = tuple(deps)
        return results[0] if len(results) == 1 else results


class _Waiting:
    """Says what a part waits for, as the barrier is when it is asked."""

    def __init__(self, barrier: _Barrier, parity: int):
        self.barrier, self.parity = barrier, parity

    def __str__(self) -> str:
        return f"the end of a phase of parity {self.parity} of {self.barrier}"


def _as_float(x: Any) -> torch.Tensor:
    return torch.as_tensor(_plain(x), dtype=torch.float32)


def _where(mask: _Tensor, x: Any, y: Any) -> _Tensor:
    x, y = _plain(x), _plain(y)
    both = [z for z in (x, y) if isinstance(z, torch.Tensor)]
    dtype = both[0].dtype if both else None
    return _Tensor(torch.where(mask.values, torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)))
