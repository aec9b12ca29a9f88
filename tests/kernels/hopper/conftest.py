import functools

import pytest
import torch
from gluon_on_cpu import launch_on_cpu

from lrnn.kernels.common.tiles import Tiles
from lrnn.kernels.delta_rule import scans
from lrnn.kernels.delta_rule.portable.chunk_forward import scan_launch


@pytest.fixture
def run_on_cpu(monkeypatch):
    """`run_on_cpu(programs, seed, changes)` makes `scans` launch kernels in Gluon on the CPU, persistent ones with so
    many programs."""
    torch.set_num_threads(1)

    def make(programs=1, seed=0, changes=()):
        monkeypatch.setattr(scans, "is_for_hopper", lambda *a: True)
        # Matrices in float32 have the tiles that they have in 16 bits.
        monkeypatch.setattr(scans, "scan_launch", lambda K, dtype: scan_launch(K, torch.bfloat16))
        monkeypatch.setattr(scans, "result_tiles", lambda x, *sizes: None if x is None else Tiles(x, *sizes[:2]))
        monkeypatch.setattr(scans, "multiprocessors", lambda device: programs)
        monkeypatch.setattr(scans, "launch", functools.partial(launch_on_cpu, seed=seed, changes=changes))

    return make
