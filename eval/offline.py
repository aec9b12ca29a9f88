"""Prepare the process for an evaluation: no network, and no progress bars in log files."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 30.0  # between two lines of a progress bar in a log


def go_offline() -> None:
    """Forbid access to the Hugging Face hub, and write progress bars as plain lines unless stderr is a terminal.

    Environment variables serve modules that are imported later. Those that `import lrnn` has already imported are set
    directly.
    """
    import huggingface_hub.constants

    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    plain_progress()


@contextmanager
def offline() -> Iterator[None]:
    """Forbid access to the Hugging Face hub within the `with` block, in a process that may need it afterwards."""
    import datasets.config
    import huggingface_hub.constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    modules: list[Any] = [huggingface_hub.constants, datasets.config]
    were = [module.HF_HUB_OFFLINE for module in modules]
    os.environ.update(dict.fromkeys(names, "1"))
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.HF_HUB_OFFLINE = was
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def plain_progress() -> None:
    """Let every tqdm bar, lm-eval's too, write a plain line every half minute and at its end, if it takes that long.

    On a terminal, bars are drawn as usual.
    """
    import tqdm

    if sys.stderr.isatty():
        return

    bar = tqdm.tqdm
    if bar.display is _line:
        return
    original = bar.__init__
    style = {
        "delay": SECONDS,
        "mininterval": SECONDS,
        "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
    }

    def plain(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, **style})

    for name, method in {
        "__init__": plain,
        "display": _line,
        "close": _last_line,
        "clear": lambda *_, **__: None,
    }.items():
        setattr(bar, name, method)


def _line(self: Any, msg: str | None = None, pos: int | None = None) -> None:
    """Write the state of a tqdm bar as a line, unless its last line says the same or is younger than half a minute."""
    last, at = getattr(self, "_last_line", (self.start_t, None))
    ends = self.n == self.total or self.disable
    if self.n != at and (ends or self._time() - last >= SECONDS):
        self._last_line = self._time(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def _last_line(self: Any) -> None:
    """Close a tqdm bar. Its end is written if it lasted long enough for lines."""
    if getattr(self, "disable", True) or not hasattr(self, "start_t"):  # the last if __init__ failed
        return
    self.disable = True
    self._decr_instances(self)
    if self._time() - self.start_t >= SECONDS:
        _line(self)
