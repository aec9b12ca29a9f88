import functools

import pytest
from delta_rule_calls import replace_launch
from gluon_on_cpu import launch_on_cpu

from lrnn.kernels.delta_rule.hopper import chunk_backward


@pytest.fixture
def run_on_cpu(monkeypatch):
    """Return `run_on_cpu(programs, seed, changes)`, after which kernels in Gluon are launched on the CPU.

    Persistent kernels run with that many programs.
    """

    def make(programs=1, seed=0, changes=()):
        monkeypatch.setattr(chunk_backward, "multiprocessors", lambda device: programs)
        replace_launch(monkeypatch, functools.partial(launch_on_cpu, seed=seed, changes=changes))

    return make
