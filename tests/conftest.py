"""The order of the tests."""

from pathlib import Path

import pytest

# With one file per process at a time, a long file that starts late leaves the other processes idle at the end.
LONGEST = (
    "slurm/test_jobs.py",
    "kernels/test_interpreted.py",
    "golden/test_golden.py",
    "kernels/test_compile.py",
    "pretrain/test_training.py",
    "eval/export/test_exported_folders.py",
    "eval/suites/test_state_tracking_suite.py",
    "pretrain/test_bad_steps.py",
    "track/test_workers.py",
    "pretrain/test_bad_input.py",
    "pretrain/corpus/test_build.py",
    "pretrain/test_trust.py",
    "eval/export/test_transformers_versions.py",
    "eval/export/test_oracle.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front."""
    place = {Path(__file__).parent / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
