"""A SLURM cluster on this machine, and the corpus that the jobs of the tests train on."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install

from lrnn.cli import main


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Return a SLURM cluster of two nodes. Skip tests that need it if it cannot be installed."""
    reason = install()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of a part of the standard library's source."""
    folder = tmp_path_factory.mktemp("slurm") / "corpus"
    source = [sysconfig.get_paths()["stdlib"], "--include", "json/*.py", "--processes", "1"]
    assert main(["corpus", *source, "--train-tokenizer", "400", "--out", str(folder)]) == 0
    return folder
