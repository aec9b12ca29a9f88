"""The values that a kernel computes with: tensors in registers, pointers, shared memory, and tiles of a matrix."""

import math
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from lrnn.kernels.common.tiles import Tiles

from .scheduler import Scheduler


def plain(x: Any) -> Any:
    """Return x as an operand for torch."""
    if isinstance(x, Tensor):
        return x.values
    return x.value if isinstance(x, tl.constexpr) else x


def as_float(x: Any) -> torch.Tensor:
    return torch.as_tensor(plain(x), dtype=torch.float32)


class Tensor:
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

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Tensor":
        return Tensor(self.values.view(dtype) if bitcast else self.values.to(dtype))

    def reshape(self, shape: list[int]) -> "Tensor":
        return Tensor(self.values.reshape(shape))

    def __getitem__(self, key: Any) -> "Tensor":
        return Tensor(self.values[key])

    def __neg__(self) -> "Tensor":
        return Tensor(-self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __index__(self) -> int:
        return operator.index(self.values.item())


def _add_operators() -> None:
    def forward(function: Callable) -> Callable:
        return lambda self, other: Tensor(function(self.values, plain(other)))

    def reflected(function: Callable) -> Callable:
        return lambda self, other: Tensor(torch.as_tensor(function(plain(other), self.values)))

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or"):
        function = getattr(operator, f"__{name}__")
        setattr(Tensor, f"__{name}__", forward(function))
        setattr(Tensor, f"__r{name}__", reflected(function))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Tensor, f"__{name}__", forward(getattr(operator, name)))


_add_operators()


class Product(Tensor):
    """The result of `warpgroup_mma`. Until it has been waited for, it can only be added to."""

    def __init__(self, shape: torch.Size):
        super().__init__(torch.empty(shape))
        self.waited_for = False

    @property
    def values(self) -> torch.Tensor:
        assert self.waited_for, "a product is used before it was waited for"
        return self._values


class Pointer:
    """A pointer into a tensor, or a tensor of pointers."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0):
        assert tensor.is_contiguous()
        self.tensor, self.offset = tensor, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + plain(offset))

    def places(self) -> torch.Tensor:
        places = torch.as_tensor(self.offset).long()
        assert (places >= 0).all() and (places < self.tensor.numel()).all(), "a pointer is outside its tensor"
        return places

    def load(self) -> Tensor:
        return Tensor(self.tensor.view(-1)[self.places()])

    def store(self, value: Tensor, mask: Tensor | None = None) -> None:
        places = self.places()
        assert places.shape == value.shape
        stored = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.values.expand(places.shape)
        self.tensor.view(-1)[places[stored]] = value.values[stored].to(self.tensor.dtype)


class Memory:
    """A view of shared memory.

    It holds the values, how many operations use each (`users`), and which of them were stored by threads and not fenced
    since (`unfenced`).
    """

    def __init__(self, scheduler: Scheduler, values: torch.Tensor, users: torch.Tensor, unfenced: torch.Tensor):
        self.scheduler, self.values, self.users, self.unfenced = scheduler, values, users, unfenced

    @classmethod
    def allocate(cls, scheduler: Scheduler, dtype: torch.dtype, shape: list[int]) -> "Memory":
        users, unfenced = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.bool)
        return cls(scheduler, torch.full(shape, torch.nan, dtype=dtype), users, unfenced)

    def _view(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Memory":
        return Memory(self.scheduler, *map(function, (self.values, self.users, self.unfenced)))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def index(self, i: Any) -> "Memory":
        return self._view(lambda x: x[operator.index(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Memory":
        return self._view(lambda x: x.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Memory":
        return self._view(lambda x: x.permute(order))

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Memory":
        assert dtype == self.dtype
        return self._view(lambda x: x.view(shape))

    def load(self, layout: Any) -> Tensor:
        self.scheduler.step("a load")
        return Tensor(self.read().clone())

    def store(self, value: Tensor) -> None:
        self.scheduler.step("a store")
        assert value.shape == self.shape and value.dtype == self.dtype, (value.shape, value.dtype, self.shape)
        self.check_unused()
        self.values.copy_(value.values)
        self.unfenced.fill_(True)
        self.scheduler.current.unfenced.append(self.unfenced)

    def read(self) -> torch.Tensor:
        assert not self.values.isnan().any(), "shared memory is read before it is there"
        return self.values

    def check_unused(self) -> None:
        assert not self.users.any(), "shared memory is written that a product or a copy may still use"

    def check_fenced(self) -> None:
        assert not self.unfenced.any(), "a product or a copy reads what was stored without a fence"


class Descriptor:
    """Tiles of a matrix, or of a tensor [rows, 1, columns] whose tiles end beyond its dimension of size 1."""

    def __init__(self, tiles: Tiles):
        self.matrix = tiles.base.as_strided(tiles.shape, tiles.strides)
        self.block_shape = tiles.block_shape
        self.dtype, self.layout = tiles.base.dtype, None
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block_shape) * tiles.base.element_size())

    def inside(self, at: Sequence[Any]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """Return the part of the matrix that is in the tile there, and its place in the tile."""
        part, places = self.matrix, []
        for dim, (start, length) in enumerate(zip(at, self.block_shape, strict=True)):
            start = operator.index(start)
            first, end = max(start, 0), min(start + length, part.shape[dim])
            may_reach_beyond = len(self.block_shape) == 3 and dim == 1
            assert first == start < end and (may_reach_beyond or end - first == length), (
                f"a tile from {start} on is outside {self.matrix.shape}"
            )
            part = part.narrow(dim, first, end - first)
            places.append(slice(first - start, end - start))
        return part, tuple(places)
