"""Compare two result folders of the same suite by paired bootstrap over the documents of each task."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.eval.result_folder import read_results
from lrnn.eval.statistics import INTERVAL, SEED, aggregate, resampled
from lrnn.eval.suites import protocol

Key = tuple[str, str, str]  # a task, a metric and a filter
Values = dict[tuple[str, int, str], Any]  # by task, number of the document, and the hash of its text


def compare(first: Path, second: Path) -> str:
    """Return a Markdown table of `second - first` for every metric that both folders hold, with a 95% interval.

    Metrics that cannot be paired by document are named below it.

    Raises:
        UserError: as for `differences`.
    """
    rows = ["| task | metric | first | second | difference | 95% interval | n |", "|---|---|---:|---:|---:|---:|---:|"]
    found = differences(first, second)
    for row in found:
        rows.append(
            f"| {row.task} | {_shown(row.metric, row.filter)} | {row.first:.4f} | {row.second:.4f} "
            f"| {row.difference:+.4f} | [{row.low:+.4f}, {row.high:+.4f}] | {row.n} |"
        )
    whole = _results(first), _results(second)
    notes = [protocol.bos_note(*whole)]
    paired = {(row.task, row.metric, row.filter) for row in found}
    if others := [f"{task} {_shown(*metric)}" for task, *metric in _common(*whole) if (task, *metric) not in paired]:
        notes.append(f"Not compared, because their values do not follow from those of documents: {', '.join(others)}.")
    return "\n".join([*rows, *(line for note in notes if note for line in ("", note))]) + "\n"


@dataclass(frozen=True)
class Difference:
    """A metric in two result folders, and the difference of the second from the first, paired by document.

    `low` and `high` are its 95% interval by bootstrap; `n` is the number of documents.
    """

    task: str
    metric: str
    filter: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    n: int


def differences(first: Path, second: Path) -> list[Difference]:
    """Return the difference of every metric that both folders hold and whose value follows from the documents'.

    Raises:
        UserError: a folder holds no results, they were computed by different protocols, a task was not run on the same
            documents in both, or they have no metric in common.
    """
    rows = []
    whole = [_results(first), _results(second)]
    protocol.check_comparable(*whole)
    for key, found in _common(*whole).items():
        a, b = (_values(*of_folder) for of_folder in zip((first, second), found, strict=True))
        if [part.keys() for part in a] != [part.keys() for part in b]:
            raise UserError(
                f"{key[0]} was run on different documents in {first} and {second}, so they cannot be paired"
            )
        rows.append(_difference(key, found, list(zip(a, b, strict=True))))
    if not rows:
        raise UserError(f"{first} and {second} have no metric in common")
    return [row for row in rows if row is not None]


def _common(first: dict[str, Any], second: dict[str, Any]) -> dict[Key, list[dict[str, Any]]]:
    """Return the metrics that two results have in common, with the row of each."""
    metrics = [{(row["task"], row["metric"], row["filter"]): row for row in of["metrics"]} for of in (first, second)]
    return {key: [row, metrics[1][key]] for key, row in metrics[0].items() if key in metrics[1]}


def _shown(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def _difference(key: Key, found: list[dict[str, Any]], documents: list[tuple[Values, Values]]) -> Difference | None:
    """Return the difference of two rows of a metric, or None if its value does not follow from those of the documents.

    That is so for metrics such as F1 of a whole task and BLEU, which lm-eval computes from predictions.
    """
    try:
        pairs = [np.array([[x[d] for d in x], [y[d] for d in x]], dtype=np.float64) for x, y in documents]
        weights = [pair.shape[1] for pair in pairs] if found[0].get("weight_by_size") else None
        values = np.average([aggregate(key[1], pair) for pair in pairs], axis=0, weights=weights)
    except (ValueError, TypeError, IndexError):
        return None
    first, second = (row["value"] for row in found)
    if values.shape != (2,) or not np.allclose(values, [first, second], rtol=1e-6, atol=1e-9):
        return None
    rng = np.random.default_rng(SEED)
    draws = np.average([resampled(key[1], pair, rng) for pair in pairs], axis=0, weights=weights)
    low, high = np.quantile(draws[1] - draws[0], INTERVAL)
    return Difference(*key, first, second, values[1] - values[0], low, high, sum(pair.shape[1] for pair in pairs))


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no results.json: it is not a result folder of `lrnn eval`")
    results = read_results(path)
    if "metrics" not in results:
        raise UserError(
            f"{folder} is not a result folder of `lrnn eval`; `lrnn position` itself compares the models it is given"
        )
    return results


def _values(folder: Path, row: dict[str, Any]) -> list[Values]:
    """Return, for each task that a row is the mean of, the value of every document by (task, number, hash of its text).

    A row names them in `parts` [[task, metric, filter]], or in `tasks` if they all have its metric and filter.

    Raises:
        UserError: the samples of a task are missing.
    """
    same = [(task, row["metric"], row["filter"]) for task in row.get("tasks", [row["task"]])]
    found = []
    for task, metric, filter_name in row.get("parts", same):
        path = folder / f"samples_{task}.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing, so the documents of {task} cannot be paired; run the evaluation again")
        with path.open("rb") as file:
            samples = [json.loads(line) for line in file]
        own = [sample for sample in samples if sample["filter"] == filter_name]
        # A document may have no value of a metric.
        found.append({(task, s["doc_id"], s["doc_hash"]): s[metric] for s in own if metric in s})
    return found
