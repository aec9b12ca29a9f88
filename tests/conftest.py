"""The order of the tests, and which of them run beside others."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from turns import turn

# Every process of the tests computes with one thread. Threads that wait for others keep a core busy: if there are fewer
# cores than threads, a test can take five times the processor time. PyTorch reads this when it is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# What is imported is not garbage, and a search of it takes seconds.
gc.disable()

# With one file per process at a time, a long file that starts late leaves the other processes idle at the end.
LONGEST = (
    "slurm/test_jobs.py",
    "kernels/test_interpreted.py",
    "golden/test_golden.py",
    "kernels/test_compile.py",
    "lrnn/test_lazy_import.py",
    "pretrain/test_training.py",
    "eval/export/test_exported_folders.py",
    "track/test_track.py",
    "track/test_training.py",
    "ladder/test_ladder.py",
    "pretrain/test_torture.py",
    "pretrain/test_recipe_chain.py",
    "pretrain/checkpoint/test_storage.py",
    "pretrain/watchdog/test_watchdog.py",
    "eval/suites/test_state_tracking_suite.py",
    "slurm/test_submit.py",
    "slurm/test_other_jobs.py",
    "pretrain/test_bad_steps.py",
    "track/test_workers.py",
    "pretrain/test_bad_input.py",
    "pretrain/corpus/test_build.py",
    "pretrain/test_trust.py",
    "eval/export/test_transformers_versions.py",
    "eval/export/test_oracle.py",
    "kernels/delta_rule/hopper/test_scans.py",
    "lrnn/test_packaging.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front, and tests that run alone to the end, where they keep no long one waiting."""
    place = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: (_is_alone(item), place.get(item.path, len(LONGEST))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with turn(Path(item.config.getoption("basetemp")).parent, _is_alone(item)):
        return (yield)


def _is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None
