"""The exporter reads folders back in a fork of a process without lrnn, which need not import transformers each time."""

from types import SimpleNamespace

import clean_process
import pytest

from lrnn.eval.export import check


@pytest.fixture(scope="module", autouse=True)
def clean_processes():
    """Replace the exporter's process. `test_new_mixer.py` has the real one: its exporter is in another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "subprocess", SimpleNamespace(run=clean_process.run))
        yield
