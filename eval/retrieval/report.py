"""Report the questions about long texts by length: accuracy, answered, accuracy given answered, accuracy by depth.

A model that answers nothing and one that answers wrongly both score 0, so the three are shown together.
"""

import csv
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lrnn.eval.commonsense.averages import average_rows
from lrnn.eval.length_plot import by_length, panels
from lrnn.eval.retrieval.needles import FORMS
from lrnn.eval.retrieval.windows import PROMPTS

Raw = dict[str, Any]

NAME = "retrieval"
UNITS = {  # of the tasks whose documents have lengths
    **{f"lrnn_needle_{form}": "tokens" for form in FORMS},
    "lrnn_recall_pairs": "pairs",
}
AVERAGES = {"recall_avg6": tuple((f"lrnn_recall_{name}", "contains") for name in PROMPTS)}
THIRDS = ("first_third", "middle_third", "last_third")
COLUMNS = (
    "task",
    "unit",
    "length",
    "n",
    "accuracy",
    "stderr",
    "answered",
    "answered_stderr",
    "given_answered",
    *THIRDS,
)


def is_by_length(metric: str) -> bool:
    """Return whether a metric of lm-eval belongs to a single length, which `length_rows` reports."""
    return re.fullmatch(r"contains_\d+", metric) is not None


def owns(row: Raw) -> bool:
    """Return whether a row by length belongs to one of these tasks."""
    return row["task"] in UNITS


def score_rows(rows: list[Raw]) -> list[Raw]:
    """Return the average over JRT's six tasks, if all were run."""
    return average_rows(rows, AVERAGES)


def length_rows(raw: Raw) -> list[Raw]:
    """Return a row (`COLUMNS`) per task and length, from the samples in the result of lm-eval's `simple_evaluate`.

    Accuracy given answered is None if nothing was answered, that of a third if no document of it was run, and errors
    are None for a single document.
    """
    rows = []
    for task, unit in UNITS.items():
        samples = raw["samples"].get(task, [])
        for length in sorted({sample["doc"]["length"] for sample in samples}):
            of_length = [sample for sample in samples if sample["doc"]["length"] == length]
            right, answered = ([float(sample[key]) for sample in of_length] for key in ("contains", "answered"))
            row: Raw = {"task": task, "unit": unit, "length": length, "n": len(of_length)}
            row |= {"accuracy": mean(right), "stderr": _error(right)}
            row |= {"answered": mean(answered), "answered_stderr": _error(answered)}
            row["given_answered"] = sum(right) / sum(answered) if any(answered) else None
            for third, name in enumerate(THIRDS):
                part = [float(sample["contains"]) for sample in of_length if sample["doc"]["third"] == third]
                row[name] = mean(part) if part else None
            rows.append(row)
    return rows


def _error(values: list[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def markdown_table(rows: list[Raw]) -> str:
    """Return a Markdown table of all rows."""
    lines = [
        "## Accuracy by length",
        "",
        "+- is one standard error. Answered: anything of the answer's form was generated. The thirds are accuracies by "
        "the place of what is asked for in the text.",
        "",
        "| task | length in | length | n | accuracy | +- | answered | given answered | first third | middle | last |",
        f"|---|---|{'---:|' * 9}",
    ]
    for row in rows:
        values = [row[key] for key in ("accuracy", "stderr", "answered", "given_answered", *THIRDS)]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {row['task']} | {row['unit']} | {row['length']} | {row['n']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write(folder: Path, rows: list[Raw], stem: str) -> None:
    """Write `stem.csv` and the plot `stem.png` into the folder."""
    with (folder / f"{stem}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(folder / f"{stem}.png", rows)


def plot(path: Path, rows: list[Raw]) -> None:
    """Plot accuracy by length with one standard error, and the share that was answered: a panel per task."""
    tasks = [task for task in UNITS if any(row["task"] == task for row in rows)]
    figure, axes = panels(len(tasks), columns=3)
    for axis, task in zip(axes, tasks, strict=True):
        curve = [row for row in rows if row["task"] == task]
        lengths, errors = [row["length"] for row in curve], [row["stderr"] or 0 for row in curve]
        axis.errorbar(lengths, [row["accuracy"] for row in curve], errors, marker=".", capsize=2, label="accuracy")
        axis.plot(lengths, [row["answered"] for row in curve], color="grey", ls=":", label="answered")
        by_length(axis, task.removeprefix("lrnn_"), UNITS[task])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
