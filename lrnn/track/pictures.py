"""Plot a grid's results: accuracy by length, and the eigenvalues over training."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lrnn.model.layers import Mixer
from lrnn.model.mixers import MIXERS
from lrnn.records import read_metrics
from lrnn.track.grid import RANGE_NAMES, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH_BINS = 24  # maximum points of a curve

Results = list[tuple[Cell, dict[str, Any]]]


def grouped(of_task: Results) -> dict[tuple[str, str], Results]:
    """Group the results of a task by model name and range; a group holds the seeds."""
    groups: dict[tuple[str, str], Results] = defaultdict(list)
    for cell, result in of_task:
        groups[cell.model_name, cell.range].append((cell, result))
    return groups


def draw_lengths(title: str, of_task: Results, training_length: int) -> "Figure":
    """Plot accuracy by length: the median of the seeds, and a band from the worst to the best.

    The majority floor is drawn only if sequences have one answer. Otherwise the accuracy at a length is the share of
    sequences that are right up to there, for which the floor of a single position is no bound.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    colors: dict[str, str] = {}
    for (model, range_), members in grouped(of_task).items():
        color = colors.setdefault(model, f"C{len(colors) % 10}")
        found = [result["by_length"] for _, result in members]
        lengths = np.array(sorted({int(n) for by_length in found for n in by_length}))
        # With few samples, a seed may have none of some length.
        curves = np.ma.masked_invalid([[by_length.get(str(n), np.nan) for n in lengths] for by_length in found])
        bins = np.array_split(np.arange(len(lengths)), min(LENGTH_BINS, len(lengths)))
        x = np.array([lengths[b].mean() for b in bins])
        y = np.ma.stack([curves[:, b].mean(1) for b in bins])  # [bins, seeds]
        style = "--" if range_ == "positive" else "-"
        axis.plot(x, np.ma.median(y, 1), style, color=color, label=f"{model} {RANGE_NAMES[range_]}")
        axis.fill_between(x, y.min(1), y.max(1), color=color, alpha=0.12)
    axis.axvline(training_length, color="grey", ls=":", label="longest in training")
    cell, result = of_task[0]
    if not cell.task.answers_along_the_way:
        axis.axhline(result["floor"], color="grey", lw=0.8, label=f"majority floor {result['floor']:.2f}")
    axis.set(title=title, xlabel="length", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def draw_eigenvalues(of_task: Results) -> "Figure | None":
    """Plot the distribution of the eigenvalues over training, all layers together, for the first seed of each group.

    Return None if no model has eigenvalues.
    """
    from matplotlib.figure import Figure

    shown = []
    for members in grouped(of_task).values():
        cell = members[0][0]
        by_step = {r["step"]: r["eigenvalues"] for r in read_metrics(cell.folder) if r.get("eigenvalues")}
        if by_step:
            shown.append((cell, by_step))
    if not shown:
        return None
    figure = Figure(figsize=(4 * len(shown), 4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, (cell, by_step) in zip(axes[0], shown, strict=True):
        steps = np.array(sorted(by_step))
        shares = np.array([np.mean(by_step[step]["histogram"], axis=0) for step in steps]).T  # [bins, steps]
        centers = np.linspace(-1, 1, shares.shape[0] * 2 + 1)[1::2]
        image = axis.pcolormesh(steps, centers, shares, vmin=0, cmap="viridis", shading="nearest")
        watched = [MIXERS[name] for name in cell.model_config.mixers if MIXERS[name].ranges is not None]
        names = {mixer.noted_eigenvalue for mixer in watched}
        name = names.pop() if len(names) == 1 else Mixer.noted_eigenvalue
        axis.set(title=f"{cell.model_name} {RANGE_NAMES[cell.range]}, seed {cell.seed}", xlabel="step", ylabel=name)
        figure.colorbar(image, ax=axis, label="share")
    return figure
