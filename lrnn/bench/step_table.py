"""The table of `lrnn bench step`: where the time of a training step goes, one column for each model."""

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lrnn.bench.kinds import KINDS, by_kind, kind_of

LABEL, COLUMN = 30, 16  # characters


@dataclass
class Workload:
    """What a step computes on one GPU.

    Attributes:
        tokens: number of tokens per step.
        flops_per_token: floating-point operations that the model needs, see `train_flops_per_token`.
        peak_flops: those that the GPU computes per second at its peak in bf16; None if that is not known.
    """

    tokens: int
    flops_per_token: float
    peak_flops: float | None


@dataclass
class Measured:
    """The figures of one model.

    Attributes:
        name: heading of its column.
        seconds: time of each step that was not profiled.
        kernels: milliseconds per step of each kernel, by name, from other steps; they sum to the time in which the GPU
            works.
        peak_bytes: largest memory that was allocated on the GPU.
        error: why there are no figures, if so.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    error: str = ""

    @property
    def milliseconds(self) -> float:
        """Return the median time of a step."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def busy(self) -> float:
        """Return the milliseconds per step in which the GPU works."""
        return self.kernels.total()

    @property
    def idle(self) -> float:
        """Return the milliseconds per step in which the GPU waits for the host."""
        return self.milliseconds - self.busy

    def figures(self, work: Workload) -> dict[str, Any]:
        """Return the figures for JSON; times are in milliseconds per step."""
        if self.error:
            return {"name": self.name, "error": self.error}
        return {
            "name": self.name,
            "kinds": dict(by_kind(self.kernels)),
            "busy": self.busy,
            "idle": self.idle,
            "steps": [1e3 * seconds for seconds in self.seconds],
            "tokens_per_second": self.tokens_per_second(work),
            "mfu": self.mfu(work),
            "peak_memory_gb": self.peak_bytes / 1e9,
            "kernels": dict(self.kernels.most_common()),
        }

    def tokens_per_second(self, work: Workload) -> float:
        """Return the tokens per second and GPU."""
        return 1e3 * work.tokens / self.milliseconds

    def mfu(self, work: Workload) -> float | None:
        """Return the share of the GPU's peak that the model's own operations use, or None if it is not known."""
        if work.peak_flops is None:
            return None
        return self.tokens_per_second(work) * work.flops_per_token / work.peak_flops


def table(columns: list[Measured], work: Workload) -> list[str]:
    """Return the lines of the table. The first column is ours; those that failed have a line of their own."""
    good = [column for column in columns if not column.error]
    kinds = [by_kind(column.kernels) for column in good]
    lines = [_row("milliseconds per step", [column.name for column in good])]
    for kind in KINDS:
        if any(kind in found for found in kinds):
            lines.append(_row(kind, [f"{found[kind]:.2f}" for found in kinds]))
    lines.append(_row("GPU busy", [f"{column.busy:.2f}" for column in good]))
    lines.append(_row("GPU idle", [f"{column.idle:.2f}" for column in good]))
    lines.append(_row("step, median", [f"{column.milliseconds:.2f}" for column in good]))
    spreads = [f"{1e3 * min(column.seconds):.1f} to {1e3 * max(column.seconds):.1f}" for column in good]
    lines.append(_row("step, shortest to longest", spreads))
    lines.append(_row("tokens/s per GPU", [f"{column.tokens_per_second(work):,.0f}" for column in good]))
    shares = [column.mfu(work) for column in good]
    lines.append(_row("MFU", ["unknown" if share is None else f"{share:.1%}" for share in shares]))
    lines.append(_row("peak memory, GB", [f"{column.peak_bytes / 1e9:.1f}" for column in good]))
    lines += [f"{column.name}: failed: {column.error}" for column in columns if column.error]
    if len(good) > 1:
        fastest = min(good[1:], key=lambda column: column.milliseconds)
        ratio = fastest.milliseconds / good[0].milliseconds
        lines.append(f"{good[0].name} has {ratio:.2f} times the tokens/s of {fastest.name}")
    return lines


def kernel_lines(column: Measured) -> list[str]:
    """Return a line for each kernel of a model: its kind, its time, and the beginning of its name."""
    lines = [f"kernels of {column.name}, milliseconds per step"]
    for kind in KINDS:
        times = Counter({name: time for name, time in column.kernels.items() if kind_of(name) == kind})
        lines += [f"{kind:{LABEL}}{time:10.3f}  {name[:120]}" for name, time in times.most_common()]
    return lines


def _row(label: str, values: list[str]) -> str:
    return f"{label:{LABEL}}" + "".join(f"{value:>{COLUMN}}" for value in values)
