"""Prepare the process for an evaluation: no network, and no progress bars in log files."""

import os
import sys
from typing import Any


def go_offline() -> None:
    """Forbid access to the Hugging Face hub, and write progress bars as plain lines unless stderr is a terminal.

    Environment variables serve modules that are imported later. Those that `import lrnn` has already imported are set
    directly.
    """
    import huggingface_hub.constants

    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if not sys.stderr.isatty():
        _plain_progress()


def _plain_progress() -> None:
    """Let every tqdm bar, lm-eval's too, write a plain line every half minute instead of redrawing itself."""
    import tqdm

    original = tqdm.tqdm.__init__
    style = {"delay": 30, "mininterval": 30, "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]\n"}

    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, **style})

    if original.__name__ != "plain":
        setattr(tqdm.tqdm, "__init__", plain)  # noqa: B010 (mypy forbids assigning to a method)
