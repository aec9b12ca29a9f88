"""The pictures of the training: loss by tokens, eigenvalues by layer."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lrnn.ladder.measures import MEASURES
from lrnn.ladder.report.gathered import Gathered, Group
from lrnn.ladder.report.pictures import Drawn
from lrnn.ladder.report.protocol import arm_title
from lrnn.ladder.report.style import Style, add_legend, grid_of_panels
from lrnn.ladder.results import CellResult

SMOOTHED_OVER = 0.02  # part of a curve
SHOWN_FROM = 0.05  # part of the tokens: the fall before that would flatten the rest
EIGENVALUE = "smallest_eigenvalue"


def draw_training(gathered: Gathered) -> Iterator[Drawn]:
    """Yield the pictures of the training."""
    if figure := _curves(gathered):
        caption = (
            f"Training loss from {SHOWN_FROM:.0%} of the tokens on, of the lowest seed of each arm and range, as a "
            f"moving average over {SMOOTHED_OVER:.0%} of the curve."
        )
        yield "training.png", "Training loss", caption, figure
    if figure := _eigenvalues(gathered):
        caption = (
            f"{MEASURES[EIGENVALUE].title.capitalize()} by layer over training, of the lowest seed. Dark is the first "
            "layer, light the last."
        )
        yield "eigenvalues.png", "Eigenvalues over training", caption, figure


def _curves(gathered: Gathered) -> Any | None:
    """Draw a panel per size and number of tokens."""
    places: dict[tuple[str, int], list[Group]] = {}
    for group, seeds in gathered.measured.items():
        if len(_losses(next(iter(seeds.values())))[0]):
            places.setdefault((group.size, group.tokens), []).append(group)
    if not places:
        return None
    style = Style(gathered)
    figure, axes = grid_of_panels(len(places), 3, sharey=False)
    for axis, ((size, tokens), groups) in zip(axes, places.items(), strict=True):
        for group in groups:
            seen, losses = _losses(next(iter(gathered.measured[group].values())))
            look = style.of((group.arm, group.range)) | {"marker": "", "lw": 1}
            axis.plot(seen / 1e6, losses, **look)
        axis.set(title=f"{size}, {tokens / 1e6:,.4g}M tokens", xlabel="million tokens", ylabel="nats per token")
    add_legend(figure, axes)
    return figure


def _losses(result: CellResult) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and smoothed training losses, each [n]; of a step that was repeated, the last record counts."""
    by_step = {r["step"]: r["loss"] for r in result.metrics if "event" not in r and isinstance(r.get("loss"), float)}
    steps = np.array(sorted(by_step))
    losses = np.array([by_step[step] for step in steps.tolist()])
    width = max(1, round(SMOOTHED_OVER * len(steps)))
    if len(steps) >= width > 1:
        losses = np.convolve(losses, np.ones(width) / width, "valid")
        steps = steps[width - 1 :]
    shown = steps >= SHOWN_FROM * result.steps
    return steps[shown] * result.tokens_per_step, losses[shown]


def _eigenvalues(gathered: Gathered) -> Any | None:
    """Draw a panel per group that has eigenvalues, a line per layer."""
    from matplotlib import colormaps

    found: dict[Group, dict[str, list[tuple[float, float]]]] = {}
    for group, seeds in gathered.measured.items():
        for figure in next(iter(seeds.values())).figures:
            if figure.measure == EIGENVALUE and figure.at is not None:
                found.setdefault(group, {}).setdefault(figure.of, []).append((figure.at, figure.value))
    if not found:
        return None
    figure, axes = grid_of_panels(len(found), 4)
    for axis, (group, layers) in zip(axes, found.items(), strict=True):
        for i, points in enumerate(layers.values()):
            color = colormaps["viridis"](0.9 * i / max(1, len(layers) - 1))
            axis.plot(*zip(*sorted(points), strict=True), color=color, marker=".", ms=4, lw=1)
        axis.axhline(0, color="grey", lw=0.8)
        axis.set(xlabel="step", ylim=(-1.05, 1.05))
        axis.set_title(f"{group.size}, {arm_title(gathered, group.arm, group.range)}", fontsize=9)
    axes[0].set_ylabel(MEASURES[EIGENVALUE].title)
    return figure
