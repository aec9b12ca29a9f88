"""An iterator that a thread runs ahead of its consumer."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import torch


def set_thread_device(device: int | None) -> None:
    """Make `device` the current GPU of the calling thread; None does nothing.

    Without this, pinning memory in a new thread would open a context on GPU 0.
    """
    if device is not None:
        torch.cuda.set_device(device)


class Prefetcher:
    """Run an iterator ahead in a thread.

    An exception of the iterator is raised in the consumer, at the place of the item that failed. `close` (or leaving
    the `with` block) stops the thread; the iterator is then at most `depth` + 1 items ahead.

    Args:
        items: the iterator; its `next` is only called in the thread.
        depth: number of items that are prepared ahead.
    """

    _END = object()

    def __init__(self, items: Iterator[Any], depth: int):
        self._items = items
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._wait_s = 0.0
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:  # The consumer raises it.
            self._put((self._END, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item, error = self._queue.get()
        self._wait_s += time.perf_counter() - start
        if item is self._END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def take_wait_s(self) -> float:
        """Return the seconds that the consumer has waited for items since the last call."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def close(self) -> None:
        """Stop the thread. Closing twice is safe."""
        self._closed.set()
        # The thread may hang in a read over the network; then it ends with the process.
        self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
