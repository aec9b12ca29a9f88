"""Collect many results in one table, with a row for each model and a column for each metric."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.result_folder import read_results
from lrnn.eval.suites import protocol

ModelKey = tuple[str, int, str]  # the folder's name, the training step (-1 if unknown), checksums of the weights


@dataclass(frozen=True)
class Collection:
    """Results by model and metric.

    Attributes:
        columns: by name of a metric, its row in the first result that has it.
        rows: by model, the values of its metrics by name, as text with the standard error; ordered by training step.
        labels: names of the models for people: the folder's, after its run's if several models of one step have folders
            of one name, such as runs/a/hf and runs/b/hf; the path of the results if that is still the name of several.
        found: every results.json of `lrnn eval`, with its path.
    """

    columns: dict[str, dict[str, Any]]
    rows: dict[ModelKey, dict[str, str]]
    labels: dict[ModelKey, str]
    found: list[tuple[Path, dict[str, Any]]]

    def name(self, key: ModelKey) -> str:
        """Return a name that no other model has: the label, with the step unless it says that."""
        label, step = self.labels[key], key[1]
        said = any(int(number) == step for number in re.findall(r"step-(\d+)", label))
        return label if step < 0 or said else f"{label}, step {step}"


def collect(folders: list[Path]) -> str:
    """Return a Markdown table of every results.json of `lrnn eval` below `folders`, ordered by training step if known.

    Raises:
        UserError: as for `read_collection`.
    """
    collection = read_collection(folders)
    columns = collection.columns
    lines = [f"| model | step | {' | '.join(columns)} |", f"|---|---:|{'---:|' * len(columns)}"]
    for key, row in collection.rows.items():
        step = key[1]
        cells = [collection.labels[key], str(step) if step >= 0 else "", *(row.get(column, "") for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_collection(folders: list[Path]) -> Collection:
    """Return the results of `lrnn eval` below `folders`, by model and metric.

    Raises:
        UserError: a folder holds no results, or two results of a model give different values for one metric.
    """
    rows: dict[ModelKey, dict[str, str]] = {}
    columns: dict[str, dict[str, Any]] = {}
    everything = [found for folder in folders for found in results_below(folder)]
    for path, results in everything:
        row = rows.setdefault(model_key(results["model"]), {})
        for metric in results["metrics"]:
            name, cell = column(metric, results), _cell(metric)
            if row.setdefault(name, cell) != cell:
                raise UserError(f"{path} says {name} = {cell}, other results of the same model say {row[name]}")
            columns.setdefault(name, metric)
    ordered = dict(sorted(rows.items(), key=lambda item: (item[0][1], item[0])))
    return Collection(columns, ordered, _labels(everything), everything)


def _labels(found: list[tuple[Path, dict[str, Any]]]) -> dict[ModelKey, str]:
    runs = {model_key(results["model"]): run_name(path, results) for path, results in found}
    known = [key[:2] for key in runs]
    labels = {key: key[0] if known.count(key[:2]) == 1 else f"{run}/{key[0]}" for key, run in runs.items()}
    places = {model_key(results["model"]): str(path.parent.parent) for path, results in found}
    shown = [(label, key[1]) for key, label in labels.items()]
    return {key: label if shown.count((label, key[1])) == 1 else places[key] for key, label in labels.items()}


def run_name(path: Path, results: dict[str, Any]) -> str:
    """Return the name of the folder that a model belongs to: its run's, where results are in one.

    They are in RUN/MODEL/eval/NAME, or in RUN/eval/step-NNNNNNNN/NAME if a batch job exported a checkpoint for itself.
    """
    parts = path.absolute().parts
    return parts[-5] if "eval" in parts[-4:-2] else Path(results["model"]["path"]).parent.name


def results_below(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return every results.json of `lrnn eval` below a folder, with its path.

    Raises:
        UserError: there is none, or as for `read_results`.
    """
    suites = [(path, results) for path, results in all_results_below(folder) if {"metrics", "model"} <= results.keys()]
    if not suites:
        raise UserError(f"{folder} holds no results.json at any depth; give folders written by `lrnn eval`")
    return suites


def all_results_below(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return every results.json below a folder, those of `lrnn position` too, with its path.

    Raises:
        UserError: as for `read_results`.
    """
    # A name that begins with a dot belongs to a result that is being written or replaced.
    paths = [p for p in folder.rglob("results.json") if not any(part.startswith(".") for part in p.parts[-2:])]
    return [(path, read_results(path)) for path in sorted(paths)]


def model_key(model: dict[str, Any]) -> ModelKey:
    """Return what identifies a model among results."""
    step = (model.get("training") or {}).get("step", -1)
    return Path(model["path"]).name, step, json.dumps(model["weights_sha256"], sort_keys=True)


def column(metric: dict[str, Any], results: dict[str, Any]) -> str:
    """Return the name of a metric: its task, the filter, and what the result asked for beyond the defaults."""
    name = f"{metric['task']} {metric['metric']}"
    name += "" if metric["filter"] == "none" else f" ({metric['filter']})"
    return ", ".join([name, *protocol.labels(results)])


def _cell(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.4f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")
