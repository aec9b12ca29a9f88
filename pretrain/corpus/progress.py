"""Progress of a long pass over text."""

import sys
import time

LINE_SECONDS = 10.0  # between two lines of progress when the output is no terminal


class Progress:
    """Show progress: a bar on a terminal, otherwise a line every `LINE_SECONDS`.

    Args:
        doing, done: what is done with the text, such as "tokenising" and "tokenised".
        total_bytes: size of the text; None if it is not known.
    """

    def __init__(self, doing: str, done: str, total_bytes: int | None):
        from tqdm import tqdm

        self._bar = tqdm(
            total=total_bytes, unit="B", unit_scale=True, desc=doing, disable=not sys.stderr.isatty(), mininterval=0.5
        )
        self._name, self._total, self._done = done, total_bytes, 0
        self._start = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._bar.update(num_bytes)
        self._done += num_bytes
        now = time.monotonic()
        if self._bar.disable and now - self._last >= LINE_SECONDS:
            self._last = now
            of = f" of {self._total / 1e6:,.0f}" if self._total else ""
            print(f"{self._name} {self._done / 1e6:,.0f}{of} MB in {now - self._start:.0f} s", flush=True)

    def close(self) -> None:
        self._bar.close()
