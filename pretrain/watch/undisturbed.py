"""Put back what an evaluation changes in the process of a run."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the states of all random numbers (Python, NumPy, torch on the CPU and on the GPU) as they are.

    On a GPU the block begins and ends without cached memory: it has what training leaves free, and training finds no
    pieces of what the block used.
    """
    on_gpu = device.type == "cuda"
    of_python, of_numpy = random.getstate(), np.random.get_state()
    if on_gpu:
        torch.cuda.empty_cache()
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        gc.collect()  # A model may be part of a reference cycle.
        if on_gpu:
            torch.cuda.empty_cache()
