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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in units if any(row["task"] == task for row in rows)]
    n_columns = min(5, len(tasks))
    n_rows = -(-len(tasks) // n_columns)
    size = (3.4 * n_columns, 3 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    lines = {"floor": ("floor", ":")}
    lines |= {title: (key, style) for (title, key), style in zip(controls.items(), CONTROL_STYLES, strict=False)}
    for axis, task in zip(axes.flat, tasks, strict=False):
        for kind, label in KINDS.items():
            curve = [row for row in rows if row["task"] == task and row["kind"] == kind]
            if curve:
                lengths = [row["length"] for row in curve]
                errors = [row["stderr"] or 0 for row in curve]
                axis.errorbar(lengths, [row["accuracy"] for row in curve], errors, marker=".", capsize=2, label=label)
                for key, style in lines.values():
                    axis.plot(lengths, [_number(row[key]) for row in curve], color="grey", ls=style, lw=1)
        axis.set(title=task, xlabel=units[task], ylim=(-0.02, 1.02))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    for title, (_, style) in lines.items():
        axes[0, 0].plot([], [], color="grey", ls=style, lw=1, label=title)
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
