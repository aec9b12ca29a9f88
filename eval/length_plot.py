"""Plot accuracy by length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = {"mc": "choosing", "gen": "generating"}
CONTROL_STYLES = ("--", "-.")


def plot(path: Path, rows: list[dict[str, Any]], units: Mapping[str, str], controls: Mapping[str, str]) -> None:
    """Plot accuracy by length with one standard error, the floor and the controls: a panel per task, a line per kind.

    Args:
        path: the PNG file to write.
        rows: the rows of `LengthReport.length_rows`.
        units: the tasks in order, with what their lengths count.
        controls: the keys of the controls in a row, by title.
    """
    tasks = [task for task in units if any(row["task"] == task for row in rows)]
    figure, axes = panels(len(tasks), columns=5)
    lines = {"floor": ("floor", ":")}
    lines |= {title: (key, style) for (title, key), style in zip(controls.items(), CONTROL_STYLES, strict=False)}
    for axis, task in zip(axes, tasks, strict=True):
        for kind, label in KINDS.items():
            curve = [row for row in rows if row["task"] == task and row["kind"] == kind]
            if curve:
                lengths = [row["length"] for row in curve]
                errors = [row["stderr"] or 0 for row in curve]
                axis.errorbar(lengths, [row["accuracy"] for row in curve], errors, marker=".", capsize=2, label=label)
                for key, style in lines.values():
                    axis.plot(lengths, [_number(row[key]) for row in curve], color="grey", ls=style, lw=1)
        by_length(axis, task, units[task])
    for title, (_, style) in lines.items():
        axes[0].plot([], [], color="grey", ls=style, lw=1, label=title)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def panels(count: int, columns: int, sharey: bool = True) -> tuple[Any, list[Any]]:
    """Return a figure with `count` panels, at most `columns` in a row, and its panels."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    n_rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns, 3 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, columns, sharey=sharey, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def by_length(axis: Any, title: str, unit: str) -> None:
    """Set up a panel of accuracy by length, in powers of 2 of a unit."""
    axis.set(title=title, xlabel=unit, ylim=(-0.02, 1.02))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
