"""Distribute the cells of a grid over several devices, with one process per device.

A process asks for the next cell, through a pipe of its own, when it has room for one. The parent hands out cells and
prints. However it ends, the processes end too, even if it is killed, because they watch it. Results are written to the
cells' folders.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, cast

import torch

from lrnn.errors import UserError
from lrnn.track.cell import train_cell
from lrnn.track.grid import Cell
from lrnn.track.interleave import interleave


def run_on_devices(
    cells: Sequence[Cell],
    devices: Sequence[torch.device],
    at_once: int,
    say: Callable[[str], None],
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train every cell, `at_once` on each device, and yield (cell, result) as each one ends.

    Raises:
        UserError: a process failed. The others are terminated; cells that have a result keep it.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    pickled = pickle.dumps(cells)  # as bytes, because tensors sent directly would share memory
    remaining = iter(range(len(cells)))
    workers: dict[Connection, tuple[SpawnProcess, torch.device]] = {}
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, pickled, device, at_once), daemon=True)
            process.start()
            theirs.close()  # so that the pipe closes with the process
            workers[ours] = process, device
        while workers:
            for pipe in cast(list[Connection], wait(list(workers))):
                process, device = workers[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    if process.exitcode != 0:
                        raise UserError(f"the process on {device} ended with status {process.exitcode}") from None
                    del workers[pipe]
                    continue
                if kind == "next":
                    pipe.send(next(remaining, None))
                elif kind == "say":
                    say(value)
                elif kind == "done":
                    number, result = value
                    yield cells[number], result
                else:
                    raise UserError(value)
    finally:
        for process, _ in workers.values():
            process.terminate()
        for process, _ in workers.values():
            process.join()


def _work(pipe: Connection, pickled: bytes, device: torch.device, at_once: int) -> None:
    """Run a process: train cells on one device until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)

    def numbers() -> Iterator[int]:
        while True:
            pipe.send(("next", None))
            number = pipe.recv()
            if number is None:
                return
            yield number

    def say(text: str) -> None:
        pipe.send(("say", text))

    try:
        cells = pickle.loads(pickled)
        for ended in interleave(numbers(), lambda i: train_cell(cells[i], device, at_once, say), at_once, device):
            pipe.send(("done", ended))
    except UserError as error:
        pipe.send(("failed", str(error)))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        pipe.send(("failed", f"on {device}: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
