"""Profile some steps of a run: a trace of `torch.profiler` and, on a GPU, a snapshot of its memory."""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks

MEMORY_EVENTS = 100_000  # allocations and frees that a memory snapshot holds, the newest ones


class StepProfiler:
    """Record the steps that `config.profile` names, on one rank, as a context manager that drops what is not written.

    It only observes: a profiled run computes the same bits. The steps are recorded once per process.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self._steps, self._rank, self._cuda = config.profile.steps, ranks.rank, ranks.device.type == "cuda"
        self._folder = Path(config.run_dir) / "profile"
        self._profile: profile | None = None
        self._first = self._last = 0
        self._written = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stop()

    @property
    def is_recording(self) -> bool:
        return self._profile is not None

    def covers(self, step: int) -> bool:
        """Return whether the step is to be recorded."""
        return self._steps is not None and not self._written and self._steps[0] <= step <= self._steps[1]

    def begin(self, step: int) -> None:
        """Record the step, if it is to be recorded."""
        if not self.covers(step):
            return
        if self._profile is None:
            self._start()
            self._first = self._last = step
        self._last = max(self._last, step - 1)  # After a rollback the run is at an earlier step again.

    def write(self, done: int) -> Path | None:
        """End the record and write it.

        Args:
            done: number of steps that are done.

        Returns:
            The folder, `RUN_DIR/profile/steps-FIRST-LAST`; None if the run ends within the first of these steps.

        Raises:
            OSError: the files cannot be written.
        """
        self._written = True
        self._last = max(self._last, done)
        if done < self._first == self._last:
            self._stop()
            return None
        folder = self._folder / f"steps-{self._first}-{self._last}"
        record = self._profile
        assert record is not None
        try:
            record.stop()
            self._profile = None
            folder.mkdir(parents=True, exist_ok=True)
            record.export_chrome_trace(str(folder / f"rank{self._rank}_trace.json.gz"))
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(folder / f"rank{self._rank}_memory_snapshot.pickle"))
        finally:
            self._stop()
        return folder

    def _start(self) -> None:
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def _stop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if self._cuda and self._first:
            torch.cuda.memory._record_memory_history(enabled=None)
