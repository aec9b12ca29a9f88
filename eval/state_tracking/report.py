"""Report the text tasks: one score per kind over all tasks, and accuracy by task and length."""

import csv
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lrnn.eval.state_tracking.tasks import TEXT_TASKS
from lrnn.track.metrics import scaled_accuracy

Raw = dict[str, Any]

NAME = "state_tracking"
METRICS = {"mc": "acc", "gen": "exact_match"}
TASK_NAMES = {kind: tuple(f"lrnn_{name}_{kind}" for name in TEXT_TASKS) for kind in METRICS}
COLUMNS = ("task", "kind", "unit", "length", "n", "accuracy", "stderr", "floor", "scaled_accuracy", "scaled_stderr")


def is_by_length(metric: str) -> bool:
    """Return whether a metric of lm-eval belongs to a single length, which `length_rows` reports."""
    return re.fullmatch(r"(acc|exact_match)_len\d+", metric) is not None


def owns(row: Raw) -> bool:
    """Return whether a row by length belongs to a text task."""
    return row["task"] in TEXT_TASKS


def score_rows(rows: list[Raw]) -> list[Raw]:
    """Return a row per kind with the mean scaled accuracy over its tasks, if every task of the kind was run.

    Rows have the form of `rows`, those of `suites.report.metric_rows`, and in addition `tasks`: the tasks averaged,
    which all have the same number of documents.
    """
    found = []
    for kind, names in TASK_NAMES.items():
        metric = f"scaled_{METRICS[kind]}"
        parts = {row["task"]: row for row in rows if row["metric"] == metric and row["task"] in names}
        if parts.keys() != set(names):
            continue
        errors = [row["stderr"] for row in parts.values()]
        shots = {row["shots"] for row in parts.values()}
        found.append(
            {
                "task": f"state_tracking_{kind}",
                "metric": metric,
                "filter": "none",
                "value": mean(row["value"] for row in parts.values()),
                "stderr": None if None in errors else math.hypot(*errors) / len(errors),
                "n": sum(row["n"] for row in parts.values()),
                "shots": f"{min(shots)} to {max(shots)}",
                "higher_is_better": True,
                "tasks": list(names),
            }
        )
    return found


def length_rows(raw: Raw) -> list[Raw]:
    """Return a row (`COLUMNS`) per task and length, from the samples in the result of lm-eval's `simple_evaluate`.

    `floor` is the best accuracy of a constant answer on the documents that were run. Errors are None for a single
    document.
    """
    rows = []
    for kind, names in TASK_NAMES.items():
        for name, task in zip(TEXT_TASKS, names, strict=True):
            samples = raw["samples"].get(task, [])
            for length in sorted({sample["doc"]["length"] for sample in samples}):
                of_length = [sample for sample in samples if sample["doc"]["length"] == length]
                scores = [float(sample[METRICS[kind]]) for sample in of_length]
                answers = [sample["doc"]["answer"] for sample in of_length]
                k, n = len(of_length[0]["doc"]["choices"]), len(scores)
                error = stdev(scores) / math.sqrt(n) if n > 1 else None
                row = {"task": name, "kind": kind, "unit": TEXT_TASKS[name].unit, "length": length, "n": n}
                row |= {"accuracy": mean(scores), "stderr": error, "floor": max(map(answers.count, answers)) / n}
                row |= {"scaled_accuracy": scaled_accuracy(mean(scores), k)}
                row |= {"scaled_stderr": None if error is None else error / (1 - 1 / k)}
                rows.append(row)
    return rows


def markdown_table(rows: list[Raw]) -> str:
    """Return a Markdown table, task x length, per kind: accuracy, and scaled accuracy in brackets."""
    parts = []
    titles = {"mc": "choosing among all answers", "gen": "generating the answer"}
    lengths = sorted({row["length"] for row in rows})
    for kind, title in titles.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if not of_kind:
            continue
        n = sorted({row["n"] for row in of_kind})
        parts += [
            f"## Accuracy by length, {title}",
            "",
            f"Documents per length: {' or '.join(map(str, n))}. +- is one standard error; the scaled accuracy is in "
            "brackets (guessing 0, perfect 1). The floor is the accuracy of the best constant answer.",
            "",
            f"| task | length in | floor | {' | '.join(map(str, lengths))} |",
            f"|---|---|---:|{'---:|' * len(lengths)}",
        ]
        for task in TEXT_TASKS:
            by_length = {row["length"]: row for row in of_kind if row["task"] == task}
            if by_length:
                floors = sorted({f"{row['floor']:.3f}" for row in by_length.values()})
                cells = [_cell(by_length.get(length)) for length in lengths]
                floor = floors[0] if len(floors) == 1 else f"{floors[0]} to {floors[-1]}"
                parts.append(f"| {task} | {TEXT_TASKS[task].unit} | {floor} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(row: Raw | None) -> str:
    if row is None:
        return ""
    error = "" if row["stderr"] is None else f" +- {row['stderr']:.3f}"
    return f"{row['accuracy']:.3f}{error} [{row['scaled_accuracy']:.3f}]"


def write(folder: Path, rows: list[Raw], stem: str) -> None:
    """Write `stem.csv` and the plot `stem.png` into the folder."""
    with (folder / f"{stem}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(folder / f"{stem}.png", rows)


def plot(path: Path, rows: list[Raw]) -> None:
    """Plot accuracy by length with one standard error and the floor: a panel per task, a line per kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in TEXT_TASKS if any(row["task"] == task for row in rows)]
    n_columns = min(5, len(tasks))
    n_rows = -(-len(tasks) // n_columns)
    size = (3.4 * n_columns, 3 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for kind, label in (("mc", "choosing"), ("gen", "generating")):
            curve = [row for row in rows if row["task"] == task and row["kind"] == kind]
            if curve:
                lengths = [row["length"] for row in curve]
                errors = [row["stderr"] or 0 for row in curve]
                axis.errorbar(lengths, [row["accuracy"] for row in curve], errors, marker=".", capsize=2, label=label)
                axis.plot(lengths, [row["floor"] for row in curve], color="grey", ls=":", lw=1)
        axis.set(title=task, xlabel=TEXT_TASKS[task].unit, ylim=(-0.02, 1.02))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
    axes[0, 0].plot([], [], color="grey", ls=":", lw=1, label="floor")
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
