"""Where the time goes between the start of a process and its first step."""

import os
import time
from pathlib import Path


class StartUp:
    """Book the time since the last lap, or since the start, under a name.

    Args:
        age_s: seconds since the start, which belong to the first lap.

    Attributes:
        seconds: what each name took, in the order of the first laps.
    """

    def __init__(self, age_s: float = 0.0):
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter() - age_s

    def lap(self, name: str) -> None:
        """Book the time up to now. A name may come several times."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"start-up took {sum(self.seconds.values()):.1f} s: {parts}"


def process_age_s() -> float:
    """Return the seconds since this process started, its imports included."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third field on
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
