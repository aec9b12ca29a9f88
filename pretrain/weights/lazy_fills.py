"""Postpone random fills of tensors: those that are overwritten are never computed, and the others by several threads.

PyTorch's modules fill their weights when they are made, and a model then fills them again with its own values. Here the
first fill only counts: the random numbers after it are those that would have followed it.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrnn.pretrain.weights.jump import advance

UNIFORM, NORMAL = torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default
VECTOR = 16  # fewer normal numbers than this come in pairs, of which one may be kept for the next call
LARGE = 2**24  # numbers that a thread draws in a row, unless a single tensor has more


@dataclass
class Fill:
    """A fill that is postponed: `tensor.uniform_` or `normal_` at a position among all random numbers."""

    tensor: Tensor
    operator: Any
    arguments: tuple
    position: int

    @property
    def draws(self) -> int:
        n = self.tensor.numel()
        # PyTorch draws the last 16 normal numbers again if they are not a whole vector.
        return n + VECTOR if self.operator is NORMAL and n % VECTOR else n

    def run(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.operator(self.tensor, *self.arguments, generator=generator)


class LazyFills(TorchDispatchMode):
    """Give tensors that are filled in the `with` block the values, bit for bit, that they would have without it.

    So it is for the generator of the CPU after the block. A fill is computed at the end of the block, or as soon as its
    tensor is read or changed otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, Fill] = {}  # by the address of the memory that is filled
        self._position = 0
        self._states = {0: torch.get_rng_state()}  # of the generator, at some positions

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leave these tensors unfilled, as `torch.empty` does. Their random numbers are skipped."""
        for tensor in tensors:
            self._waiting.pop(_address(tensor), None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self._run(self._waiting.values())
            torch.set_rng_state(self._state_at(self._position))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (UNIFORM, NORMAL) and not kwargs and _can_wait(func, args[0]):
            fill = Fill(args[0], func, args[1:], self._position)
            self._waiting[_address(fill.tensor)] = fill
            self._position += fill.draws
            return fill.tensor
        used = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self._run([self._waiting.pop(address) for address in used & self._waiting.keys()])
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        torch.set_rng_state(self._state_at(self._position))
        result = func(*args, **kwargs)
        self._position += 1  # How many numbers it drew is not known, and not needed.
        self._states[self._position] = torch.get_rng_state()
        return result

    def _run(self, fills: Iterable[Fill]) -> None:
        """Compute fills, each row of adjacent ones with its own generator, in as many threads as torch has."""
        tasks = [(self._state_at(row[0].position), row) for row in _rows(fills)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda task: _run_row(*task), tasks))

    def _state_at(self, position: int) -> Tensor:
        """Return the generator's state at a position."""
        if position not in self._states:
            known = max(p for p in self._states if p < position)
            self._states[position] = advance(self._states[known], position - known)
        return self._states[position]


def _can_wait(operator: Any, tensor: Tensor) -> bool:
    """Return whether the number of draws is known, and an overwriting fill overwrites all of the memory."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        return False
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return whole and tensor.numel() >= (VECTOR if operator is NORMAL else 1)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows(fills: Iterable[Fill]) -> list[list[Fill]]:
    """Return fills in rows, in which each one begins where the one before ends."""
    rows: list[list[Fill]] = []
    size = 0
    for fill in sorted(fills, key=lambda fill: fill.position):
        last = rows[-1][-1] if rows else None
        if last is None or size >= LARGE or last.position + last.draws != fill.position:
            rows.append([])
            size = 0
        rows[-1].append(fill)
        size += fill.draws
    return rows


def _run_row(state: Tensor, row: list[Fill]) -> None:
    generator = torch.Generator()
    generator.set_state(state)
    for fill in row:
        fill.run(generator)
