"""Do several works at once on one device, driven by one thread.

One tiny model leaves most of a GPU idle. Others fill it, each on a CUDA stream of its own: while the GPU executes what
is queued for one, the thread queues kernels for the next.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")

# A work is done in pieces. After each it yields a function that tells whether the device has finished the piece, and
# must not be continued before that.
Work = Generator[Callable[[], bool], None, T]

POLL_S = 1e-4  # pause if no work can continue


def finished(device: torch.device) -> Callable[[], bool]:
    """Return a function that tells, without waiting, whether everything queued so far on the current stream is done."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record()
    return event.query


class _Place:
    """Room for one work at a time. Its stream is reused, because libraries keep a workspace per stream."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.work: tuple | None = None  # the x that it belongs to, and the work
        self.may_continue: Callable[[], bool] = lambda: True

    def do_piece(self) -> None:
        """Do a piece. Raise StopIteration with the value of the work at its end."""
        assert self.work is not None
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.may_continue = next(self.work[1])


def interleave(
    todo: Iterable[A], start: Callable[[A], Work[T]], at_once: int, device: torch.device
) -> Iterator[tuple[A, T]]:
    """Do the work `start(x)` for each x of `todo`, `at_once` at a time, and yield (x, its value) as each one ends.

    The next x of `todo` is taken when there is room for it. A work that raises ends all works.
    """
    remaining = iter(todo)
    places = [_Place(device) for _ in range(at_once)]
    try:
        while True:
            is_idle = True
            for place in places:
                if place.work is None:
                    for x in remaining:
                        place.work, place.may_continue = (x, start(x)), lambda: True
                        break
                if place.work is None or not place.may_continue():
                    continue
                is_idle = False
                try:
                    place.do_piece()
                except StopIteration as end:
                    x, place.work = place.work[0], None
                    yield x, end.value
            if all(place.work is None for place in places) and is_idle:
                return
            if is_idle:
                time.sleep(POLL_S)
    finally:
        for place in places:
            if place.work is not None:
                place.work[1].close()
