"""Tables and pictures of a grid: accuracy by length, best and median over seeds, where the eigenvalues went."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lrnn.eval.state_tracking.grid import RANGE_NAMES, Cell, GridConfig
from lrnn.eval.state_tracking.papers import reported
from lrnn.pretrain.checkpoint import write_atomically
from lrnn.pretrain.metrics import read_metrics

LENGTH_BINS = 24  # points of a curve, at most
HOLDS = 0.9  # accuracy

Group = tuple[str, str]  # model name, range


def write_report(grid: GridConfig, cells: list[Cell], results: list[dict[str, Any]]) -> str:
    """Write `results.csv`, `table.md` and pictures into the grid's folder; returns the table."""
    out = Path(grid.out)
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "model", "range", "seed", "length", "accuracy"])
        for result in results:
            for length, accuracy in result["by_length"].items():
                writer.writerow([*(result[k] for k in ("task", "model", "range", "seed")), length, f"{accuracy:.6f}"])
    sections = []
    for task in grid.tasks:
        of_task = [(cell, result) for cell, result in zip(cells, results, strict=True) if cell.task_name == task]
        sections.append(_table(grid, task, of_task))
        _plot_lengths(out / f"accuracy-{task}.png", grid, task, of_task)
        _plot_eigenvalues(out / f"eigenvalues-{task}.png", of_task)
    text = "\n".join([*sections, _origin(results)])
    write_atomically(out / "table.md", text)
    return text


def holds_to(by_length: dict[str, float]) -> int:
    """The longest length up to which the accuracy at every length is at least `HOLDS`; 0 if not even at the first.

    Keys are lengths in ascending order, as in result.json.
    """
    longest = 0
    for length, accuracy in by_length.items():
        if accuracy < HOLDS:
            break
        longest = int(length)
    return longest


def _grouped(of_task: list[tuple[Cell, dict[str, Any]]]) -> dict[Group, list[tuple[Cell, dict[str, Any]]]]:
    groups: dict[Group, list[tuple[Cell, dict[str, Any]]]] = defaultdict(list)
    for cell, result in of_task:
        groups[cell.model_name, cell.range].append((cell, result))
    return groups


def _table(grid: GridConfig, task: str, of_task: list[tuple[Cell, dict[str, Any]]]) -> str:
    """Scaled accuracy over all test samples: best [median] of the seeds, the papers' figure, the majority floor."""
    train, test = grid.train, grid.test
    lines = [
        f"## {task}",
        "",
        f"Trained on lengths {train.min_length} to {train.max_length} for {train.steps} steps of {train.batch_size}, "
        f"tested on {test.min_length} to {test.max_length} ({test.samples} sequences a seed). Scaled accuracy, best "
        f"[median] of {len(grid.seeds)} seeds; always giving the most frequent answer has "
        f"{of_task[0][1]['scaled_floor']:.3f}. A model holds to a length if its accuracy is at least {HOLDS} at that "
        "one and all tested below.",
        "",
    ]
    lines += _curriculum_lines(grid)
    if train.state_passing:
        lines += [
            f"With probability {train.state_passing:g} a sequence went on, in state and answers, where the one before "
            "in its row had ended, if that was right throughout: gradients stay within these lengths, states do not.",
            "",
        ]
    for model, fields in grid.models.items():
        if own := fields.get("train"):
            lines += [f"{model} was trained with {', '.join(f'{k} {v}' for k, v in own.items())}.", ""]
    lines += [
        "| model | eigenvalues | scaled accuracy | at the longest length | holds to | papers | steps/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, _), members in _grouped(of_task).items():
        scores = [result["scaled_accuracy"] for _, result in members]
        last = [list(result["by_length"].values())[-1] for _, result in members]
        cell = members[0][0]
        config = cell.model_config
        paper = reported(grid.tasks[task], config.mixer, cell.range, config.num_householder, config.num_hidden_layers)
        holds = [holds_to(result["by_length"]) for _, result in members]
        lines.append(
            f"| {model} | {RANGE_NAMES[cell.range]} | {max(scores):.3f} [{median(scores):.3f}] "
            f"| {max(last):.3f} [{median(last):.3f}] | {max(holds)} [{median(holds):.0f}] "
            f"| {paper} | {_speed(result for _, result in members)} |"
        )
    return "\n".join(lines) + "\n"


def _curriculum_lines(grid: GridConfig) -> list[str]:
    """What was trained ahead of what the table's first line says."""
    lines = []
    for stage in grid.train.curriculum:
        settings = grid.train.model_copy(update=stage.model_dump(exclude={"task"}, exclude_none=True))
        changes = "".join(f", {name} {value}" for name, value in stage.task.items())
        lines += [
            f"Ahead of that: lengths {settings.min_length} to {settings.max_length} for {settings.steps} steps of "
            f"{settings.batch_size}, lr {settings.lr:g}{changes}.",
            "",
        ]
    return lines


def _speed(results: Iterable[dict[str, Any]]) -> str:
    """The median of the seeds, of one among several cells that shared a device; "-" where none has one."""
    speeds = [result["steps_per_second"] for result in results if result.get("steps_per_second")]
    return f"{median(speeds):.0f}" if speeds else "-"


def _origin(results: list[dict[str, Any]]) -> str:
    """On what the results were computed, how many cells at a time, with which software."""
    lines = set()
    for result in results:
        if facts := result.get("environment"):
            names = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "commit") if name in facts)
            lines.add(f"Run on {facts['device']}, {result['concurrent']} at a time, with {names}.")
    return "\n".join(sorted(lines)) + "\n"


def _plot_lengths(path: Path, grid: GridConfig, task: str, of_task: list[tuple[Cell, dict[str, Any]]]) -> None:
    """Accuracy by length: the median of the seeds, and a band from the worst to the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    colors: dict[str, str] = {}
    for (model, range_), members in _grouped(of_task).items():
        color = colors.setdefault(model, f"C{len(colors) % 10}")
        found = [result["by_length"] for _, result in members]
        lengths = np.array(sorted({int(n) for by_length in found for n in by_length}))
        # of few samples a seed may have none of some length
        curves = np.ma.masked_invalid([[by_length.get(str(n), np.nan) for n in lengths] for by_length in found])
        bins = np.array_split(np.arange(len(lengths)), min(LENGTH_BINS, len(lengths)))
        x = np.array([lengths[b].mean() for b in bins])
        y = np.ma.stack([curves[:, b].mean(1) for b in bins])  # [bins, seeds]
        style = "--" if range_ == "positive" else "-"
        axis.plot(x, np.ma.median(y, 1), style, color=color, label=f"{model} {RANGE_NAMES[members[0][0].range]}")
        axis.fill_between(x, y.min(1), y.max(1), color=color, alpha=0.12)
    axis.axvline(grid.train.max_length, color="grey", ls=":", label="longest in training")
    floor = of_task[0][1]["floor"]
    axis.axhline(floor, color="grey", lw=0.8, label=f"majority floor {floor:.2f}")
    axis.set(title=task, xlabel="length", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_eigenvalues(path: Path, of_task: list[tuple[Cell, dict[str, Any]]]) -> None:
    """The distribution of 1 - beta over training, all layers together, of the first seed of each model and range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = []
    for members in _grouped(of_task).values():
        cell = members[0][0]
        by_step = {r["step"]: r["eigenvalues"] for r in read_metrics(cell.folder) if r.get("eigenvalues")}
        if by_step:
            shown.append((cell, by_step))
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, (cell, by_step) in zip(axes[0], shown, strict=True):
        steps = np.array(sorted(by_step))
        shares = np.array([np.mean(by_step[step]["histogram"], axis=0) for step in steps]).T  # [bins, steps]
        centers = np.linspace(-1, 1, shares.shape[0] * 2 + 1)[1::2]
        image = axis.pcolormesh(steps, centers, shares, vmin=0, cmap="viridis", shading="nearest")
        axis.set(title=f"{cell.model_name} {RANGE_NAMES[cell.range]}", xlabel="step", ylabel="eigenvalue 1 - beta")
        figure.colorbar(image, ax=axis, label="share")
    figure.savefig(path, dpi=120)
    plt.close(figure)
