"""Plot runs: loss (with marks at resumes and bad steps), learning rate, speed, eigenvalues, and scores of evaluations.

Runs are compared in one picture, a line each. With `--band`, runs whose configurations differ by `seed` alone become
one line, their mean, with a band around it: from the smallest to the largest (`minmax`), or one standard error of the
mean to both sides (`stderr`). Only steps that all of them have are shown, and no marks. Whiskers at the scores of a
single run are the standard errors over documents that lm-eval reports.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.metrics.curves import MARKS, Band, Curve, Group, Records, group_by_seed, limits, read_run
from lrnn.records import HELDOUT_OF_CORPUS

MARKERS = "^v<>sdP*"  # of corpora
COLUMNS = 4  # panels of scores per row
BANDS = {"minmax": "smallest to largest of the seeds", "stderr": "standard error of the mean over seeds"}


def plot_runs(run_dirs: Sequence[Path], out: Path, band: Band | None = None, smoothing: float = 0.0) -> None:
    """Write a picture of the runs, as PNG, PDF or SVG by the extension of `out`.

    Args:
        run_dirs: folders of runs.
        out: the file.
        band: what to draw around the mean of runs that differ by seed; None for a line per run.
        smoothing: weight of the past in the moving average of training loss and speed, which is drawn over the values
            themselves; 0 for none.

    Raises:
        UserError: a folder has no metrics, a run has no step yet, or matplotlib cannot write the extension.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [read_run(run_dir) for run_dir in run_dirs]
    groups = [Group(run.name, [run]) for run in runs] if band is None else group_by_seed(runs)
    names = list(dict.fromkeys(name for run in runs for name in _score_names(run)))
    below = -(-len(names) // COLUMNS)
    figure = plt.figure(figsize=(13, 8 + 2.6 * below), layout="constrained")
    upper, *lower = figure.subfigures(
        2 if below else 1, 1, height_ratios=[8, 2.6 * below] if below else None, squeeze=False
    )[:, 0]
    try:
        _draw_training(upper, groups, band, smoothing)
        for panels in lower:
            _draw_scores(panels, groups, names, band)
        if any(len(group.runs) > 1 for group in groups) and band is not None:
            figure.suptitle(f"line: mean of the seeds, band: {BANDS[band]}", fontsize=9)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"--out {out}: {error}") from None
    finally:
        plt.close(figure)


def _draw_training(figure: Any, groups: Sequence[Group], band: Band | None, smoothing: float) -> None:
    """Draw loss, learning rate, speed and eigenvalues."""
    axes = figure.subplots(2, 2)
    for i, group in enumerate(groups):
        name, color = group.name, f"C{i % 10}"
        _line(axes[0, 0], group, lambda run: run.curve("loss"), band, smoothing, color=color, label=f"{name} training")
        heldout: dict[str, Any] = {"color": color, "marker": "o", "ms": 4, "ls": "--", "label": f"{name} held-out"}
        _line(axes[0, 0], group, lambda run: run.curve("heldout_loss"), band, **heldout)
        _draw_corpora(axes[0, 0], group, band, color)
        _line(axes[0, 1], group, lambda run: run.curve("lr"), band, color=color)
        _line(axes[1, 0], group, lambda run: run.curve("tokens_per_second_per_gpu"), band, smoothing, color=color)
        if len(group.runs) == 1:
            _marks(axes[0, 0], group.runs[0], color)
    first = groups[0].runs[0]
    _eigenvalues(figure, axes[1, 1], first.by_step, first.name if sum(len(g.runs) for g in groups) > 1 else "")
    axes[0, 0].set(title="loss", xlabel="step", ylabel="nats per token")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(title="learning rate", xlabel="step")
    axes[1, 0].set(title="speed", xlabel="step", ylabel="tokens/s per process")
    axes[1, 0].set_ylim(bottom=0)
    for axis in axes.flat[:3]:
        axis.grid(alpha=0.3)


def _draw_corpora(axis: Any, group: Group, band: Band | None, color: str) -> None:
    """Draw the held-out loss of each corpus."""
    for i, corpus in enumerate(group.runs[0].corpora):
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "label": f"{group.name} held-out {corpus}"}
        key = HELDOUT_OF_CORPUS + corpus
        _line(axis, group, partial(Records.curve, key=key), band, color=color, ms=4, ls=":", **style)


def _line(
    axis: Any,
    group: Group,
    get: Callable[[Records], Curve],
    band: Band | None,
    smoothing: float = 0.0,
    **style: Any,
) -> None:
    """Draw the mean of a group, with a band if it has several runs. With smoothing, the values themselves are faint."""
    steps, values = group.joined(get, smoothing)
    if not steps:
        return
    style = {"lw": 1.4 if smoothing else 1} | style
    axis.plot(steps, values.mean(0), **style)
    if smoothing:
        axis.plot(*_mean(group, get), color=style["color"], lw=1, alpha=0.25)
    if band is not None and len(values) > 1:
        axis.fill_between(steps, *limits(values, band), color=style["color"], alpha=0.2, lw=0)


def _mean(group: Group, get: Callable[[Records], Curve]) -> tuple[list[int], Any]:
    steps, values = group.joined(get)
    return steps, values.mean(0)


def _marks(axis: Any, run: Records, color: str) -> None:
    """Draw a line at each resume and bad step."""
    for what, steps in run.marked.items():
        for i, step in enumerate(steps):
            label = f"{run.name} {what.replace('_', ' ')}" if i == 0 else None
            axis.axvline(step, color=color, ls=MARKS[what], lw=1, alpha=0.6, label=label)


def _score_names(run: Records) -> list[tuple[str, str]]:
    """Return the tasks and metrics that a run was evaluated with."""
    pairs = ((task, key) for event in run.scores.values() for task, found in event["scores"].items() for key in found)
    return list(dict.fromkeys(pairs))


def _draw_scores(figure: Any, groups: Sequence[Group], names: Sequence[tuple[str, str]], band: Band | None) -> None:
    """Draw a panel for each task and metric of the evaluations."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(-(-len(names) // COLUMNS), COLUMNS, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        for i, group in enumerate(groups):
            style: dict[str, Any] = {"color": f"C{i % 10}", "marker": ".", "lw": 1}
            if len(group.runs) > 1:
                _line(axis, group, partial(Records.score, name=name), band, **style)
            else:
                curve = group.runs[0].score(name)
                if curve.steps:
                    axis.errorbar(curve.steps, curve.values, curve.errors, capsize=2, elinewidth=0.5, **style)
        axis.set_title("\n".join(name), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)


def _eigenvalues(figure: Any, axis: Any, by_step: dict[int, dict[str, Any]], name: str) -> None:
    """Draw the share of negative eigenvalues by layer over training."""
    import numpy as np

    points = [(s, r["eigenvalues"]["negative_fraction"]) for s, r in by_step.items() if r.get("eigenvalues")]
    axis.set(title=f"share of eigenvalues 1 - beta below 0 {name}", xlabel="step", ylabel="layer")
    axis.yaxis.get_major_locator().set_params(integer=True)
    if not points:
        return
    layers = range(max(int(layer) for _, fractions in points for layer in fractions) + 1)
    # A layer whose mixer has no range of eigenvalues stays blank.
    shares = np.array([[fractions.get(str(layer), np.nan) for layer in layers] for _, fractions in points]).T
    steps = np.array([s for s, _ in points])
    image = axis.pcolormesh(steps, np.arange(len(layers)), shares, vmin=0, vmax=1, cmap="coolwarm", shading="nearest")
    figure.colorbar(image, ax=axis)


def weight(text: str) -> float:
    """Return the weight of a moving average, from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} should be at least 0 and below 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, help="picture to write; default RUN_DIR/metrics.png of the first run")
    parser.add_argument("--band", choices=BANDS, help="join runs that differ by seed, with a band around their mean")
    parser.add_argument(
        "--smooth",
        type=weight,
        default=0.0,
        metavar="W",
        help="smooth training loss and speed as TensorBoard does, e.g. 0.9; the values themselves are drawn faintly",
    )
    parser.epilog = (
        "examples:\n  lrnn plot runs/340m runs/340m-positive --smooth 0.9 --out ranges.png\n"
        "  lrnn plot runs/340m-seed* runs/340m-positive-seed* --band stderr --out ranges.png"
    )


def main(args: argparse.Namespace) -> int:
    out = args.out or args.run_dirs[0] / "metrics.png"
    plot_runs(args.run_dirs, out, args.band, args.smooth)
    print(f"wrote {out}")
    return 0
