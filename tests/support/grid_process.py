"""A grid of `lrnn track` over two devices, here two processes on the CPU, in a process that leads its own group."""

import multiprocessing
import os
import signal
from pathlib import Path
from unittest.mock import patch

import torch
from fork_server import redirect_output

from lrnn.errors import UserError
from lrnn.track.grid import load_grid
from lrnn.track.workers import run_on_devices


def run(grid: Path, output: Path, start: str) -> None:
    """Train the cells of the file `grid`. Write their lines, and an error of the user, to `output`.

    Args:
        start: how the processes of the devices start: "spawn", or "fork", which takes seconds less.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    redirect_output(output)
    context = multiprocessing.get_context(start)
    devices = [torch.device("cpu")] * 2
    with patch("multiprocessing.get_context", lambda kind: context):
        try:
            for _ in run_on_devices(load_grid(grid)[1], devices, 1, lambda text: print(text, flush=True)):
                pass
        except UserError as error:
            print(f"UserError: {error}", flush=True)
