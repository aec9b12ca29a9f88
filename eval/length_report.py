"""Report tasks whose documents have several lengths: one score per kind, and accuracy by task and length."""

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

from lrnn.eval.length_plot import plot
from lrnn.track.metrics import scaled_accuracy

Raw = dict[str, Any]

METRICS = {"mc": "acc", "gen": "exact_match"}
TITLES = {"mc": "choosing among all answers", "gen": "generating the answer"}
COLUMNS = ("task", "kind", "unit", "length", "n", "accuracy", "stderr", "floor", "scaled_accuracy", "scaled_stderr")


class Questions(Protocol):
    """A task: what a length counts, and the possible answers."""

    @property
    def unit(self) -> str: ...

    @property
    def choices(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class LengthReport:
    """The report of some tasks. Each is asked by choosing (`mc`) and by generating (`gen`).

    Attributes:
        NAME: the name of the suite. The scores are called `NAME_mc` and `NAME_gen`.
        tasks: the tasks by name; lm-eval knows them as `lrnn_{name}_mc` and `lrnn_{name}_gen`.
        scores: the metric of each kind whose mean over the tasks is the score.
        note: more sentences for the table, each after a space.
        controls: answers that need no tracking, by title: the key of a document that holds such an answer, or None.
    """

    NAME: str
    tasks: Mapping[str, Questions]
    scores: Mapping[str, str]
    note: str = ""
    controls: Mapping[str, str] = field(default_factory=dict)

    @property
    def task_names(self) -> dict[str, tuple[str, ...]]:
        return {kind: tuple(f"lrnn_{name}_{kind}" for name in self.tasks) for kind in METRICS}

    def is_by_length(self, metric: str) -> bool:
        """Return whether a metric of lm-eval belongs to a single length, which `length_rows` reports."""
        return re.fullmatch(r"(acc|exact_match)_len\d+", metric) is not None

    def owns(self, row: Raw) -> bool:
        """Return whether a row by length belongs to one of these tasks."""
        return row["task"] in self.tasks

    def score_rows(self, rows: list[Raw]) -> list[Raw]:
        """Return a row per kind with the mean of `scores` over its tasks, if every task of the kind was run.

        Rows have the form of `rows`, those of `suites.report.metric_rows`, and in addition `tasks`: the tasks averaged,
        which all have the same number of documents.
        """
        found = []
        for kind, names in self.task_names.items():
            metric = self.scores[kind]
            parts = {row["task"]: row for row in rows if row["metric"] == metric and row["task"] in names}
            if parts.keys() != set(names):
                continue
            errors = [row["stderr"] for row in parts.values()]
            shots = {row["shots"] for row in parts.values()}
            found.append(
                {
                    "task": f"{self.NAME}_{kind}",
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

    def length_rows(self, raw: Raw) -> list[Raw]:
        """Return a row (`COLUMNS`) per task and length, from the samples in the result of lm-eval's `simple_evaluate`.

        `floor` is the best accuracy of a constant answer on the documents that were run. Errors are None for a single
        document. A row also has the accuracy of every control, None if it has no answer for any document.
        """
        rows = []
        for kind, names in self.task_names.items():
            for name, task in zip(self.tasks, names, strict=True):
                samples = raw["samples"].get(task, [])
                for length in sorted({sample["doc"]["length"] for sample in samples}):
                    of_length = [sample for sample in samples if sample["doc"]["length"] == length]
                    row = {"task": name, "kind": kind, "unit": self.tasks[name].unit, "length": length}
                    rows.append(row | _accuracies([float(sample[METRICS[kind]]) for sample in of_length], of_length))
                    rows[-1] |= {key: _control([s["doc"] for s in of_length], key) for key in self.controls.values()}
        return rows

    def markdown_table(self, rows: list[Raw]) -> str:
        """Return a Markdown table, task x length, per kind: accuracy, and scaled accuracy in brackets."""
        parts = []
        lengths = sorted({row["length"] for row in rows})
        for kind, title in TITLES.items():
            of_kind = [row for row in rows if row["kind"] == kind]
            if not of_kind:
                continue
            n = sorted({row["n"] for row in of_kind})
            columns = ["task", "length in", "floor", *self.controls, *map(str, lengths)]
            parts += [
                f"## Accuracy by length, {title}",
                "",
                f"Documents per length: {' or '.join(map(str, n))}. +- is one standard error; the scaled accuracy is "
                "in brackets (guessing 0, perfect 1). The floor is the accuracy of the best constant answer."
                f"{self.note}",
                "",
                f"| {' | '.join(columns)} |",
                f"|---|---|{'---:|' * (len(columns) - 2)}",
            ]
            for task in self.tasks:
                by_length = {row["length"]: row for row in of_kind if row["task"] == task}
                if by_length:
                    cells = [task, self.tasks[task].unit, _span(by_length.values(), "floor")]
                    cells += [_mean(by_length.values(), key) for key in self.controls.values()]
                    cells += [_cell(by_length.get(length)) for length in lengths]
                    parts.append(f"| {' | '.join(cells)} |")
            parts.append("")
        return "\n".join(parts)

    def write(self, folder: Path, rows: list[Raw], stem: str) -> None:
        """Write `stem.csv` and the plot `stem.png` into the folder."""
        with (folder / f"{stem}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*COLUMNS, *self.controls.values()])
            writer.writeheader()
            writer.writerows(rows)
        units = {task: questions.unit for task, questions in self.tasks.items()}
        plot(folder / f"{stem}.png", rows, units, self.controls)


def _accuracies(scores: list[float], samples: list[Raw]) -> Raw:
    """Return the columns of a row that follow from the scores of its documents."""
    answers = [sample["doc"]["answer"] for sample in samples]
    k, n = len(samples[0]["doc"]["choices"]), len(scores)
    error = stdev(scores) / math.sqrt(n) if n > 1 else None
    row = {"n": n, "accuracy": mean(scores), "stderr": error, "floor": max(map(answers.count, answers)) / n}
    row |= {"scaled_accuracy": scaled_accuracy(mean(scores), k)}
    return row | {"scaled_stderr": None if error is None else error / (1 - 1 / k)}


def _control(docs: list[Raw], key: str) -> float | None:
    """Return the share of documents in which the answer `doc[key]` is right, or None if no document has one."""
    if all(doc[key] is None for doc in docs):
        return None
    return mean(float(doc[key] == doc["choices"][doc["answer"]]) for doc in docs)


def _span(rows: Iterable[Raw], key: str) -> str:
    values = sorted({f"{row[key]:.3f}" for row in rows})
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _mean(rows: Iterable[Raw], key: str) -> str:
    """Return the mean over the documents of all lengths."""
    known = [row for row in rows if row[key] is not None]
    return f"{sum(row[key] * row['n'] for row in known) / sum(row['n'] for row in known):.3f}" if known else "none"


def _cell(row: Raw | None) -> str:
    if row is None:
        return ""
    error = "" if row["stderr"] is None else f" +- {row['stderr']:.3f}"
    return f"{row['accuracy']:.3f}{error} [{row['scaled_accuracy']:.3f}]"
