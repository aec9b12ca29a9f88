"""Plot the metrics of runs: loss (with marks at resumes and bad steps), learning rate, speed and eigenvalues."""

import argparse
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.records import read_metrics

MARKS = {"resumed": ":", "loss_spike": "--", "skipped_step": "-", "rollback": "-."}  # line style of each mark


def split_records(records: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], dict[str, list[int]]]:
    """Return the records by step (of a repeated step the later one), and the steps of each event in `MARKS`."""
    by_step: dict[int, dict[str, Any]] = {}
    marked: dict[str, list[int]] = {name: [] for name in MARKS}
    for record in records:
        event = record.get("event")
        if event == "start":
            if record["resumed"]:
                marked["resumed"].append(record["step"])
        elif event in marked:
            marked[event].append(record["step"])
        elif event is None:
            by_step[record["step"]] = record
    return dict(sorted(by_step.items())), marked


def plot_runs(run_dirs: list[Path], out: Path) -> None:
    """Write a picture of the runs, as PNG, PDF or SVG by the extension of `out`.

    Raises:
        UserError: a folder has no metrics, a run has no step yet, or matplotlib cannot write the extension.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {}
    for run_dir in run_dirs:
        by_step, marked = split_records(read_metrics(run_dir))
        if not by_step:
            raise UserError(f"{run_dir}/metrics.jsonl holds no step yet")
        runs[str(run_dir)] = (by_step, marked)
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for i, (name, (by_step, marked)) in enumerate(runs.items()):
        _lines(axes, name, by_step, marked, f"C{i % 10}")
    first, (by_step, _) = next(iter(runs.items()))
    _eigenvalues(figure, axes[1, 1], by_step, first if len(runs) > 1 else "")
    axes[0, 0].set(title="loss", xlabel="step", ylabel="nats per token")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set(title="learning rate", xlabel="step")
    axes[1, 0].set(title="speed", xlabel="step", ylabel="tokens/s per process")
    axes[1, 0].set_ylim(bottom=0)
    for axis in axes.flat[:3]:
        axis.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"--out {out}: {error}") from None
    finally:
        plt.close(figure)


def _lines(axes: Any, name: str, by_step: dict[int, dict[str, Any]], marked: dict[str, list[int]], color: str) -> None:
    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(step, record[key]) for step, record in by_step.items() if record.get(key) is not None]
        return [p[0] for p in points], [p[1] for p in points]

    axes[0, 0].plot(*series("loss"), color=color, lw=1, label=f"{name} training")
    heldout = series("heldout_loss")
    if heldout[0]:
        axes[0, 0].plot(*heldout, color=color, marker="o", ms=4, ls="--", lw=1, label=f"{name} held-out")
    for what, steps in marked.items():
        for i, step in enumerate(steps):
            label = f"{name} {what.replace('_', ' ')}" if i == 0 else None
            axes[0, 0].axvline(step, color=color, ls=MARKS[what], lw=1, alpha=0.6, label=label)
    axes[0, 1].plot(*series("lr"), color=color)
    axes[1, 0].plot(*series("tokens_per_second_per_gpu"), color=color, lw=1)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, help="picture to write; default RUN_DIR/metrics.png of the first run")
    parser.epilog = "example:\n  lrnn plot runs/340m runs/340m-positive --out ranges.png"


def main(args: argparse.Namespace) -> int:
    out = args.out or args.run_dirs[0] / "metrics.png"
    plot_runs(args.run_dirs, out)
    print(f"wrote {out}")
    return 0
