"""Compare two result folders of the same suite by paired bootstrap over documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.eval.statistics import INTERVAL, RESAMPLES, SEED, bits_per_byte


def compare(first: Path, second: Path) -> str:
    """Return a Markdown table of `second - first` for every metric that both folders hold, with a 95% interval.

    Raises:
        UserError: a folder holds no results, or a task was not run on the same documents in both.
    """
    rows = ["| task | metric | first | second | difference | 95% interval | n |", "|---|---|---:|---:|---:|---:|---:|"]
    metrics = [_results(first), _results(second)]
    for key in (key for key in metrics[0] if key in metrics[1]):
        task, metric, filter_name = key
        values = [row["value"] for row in (metrics[0][key], metrics[1][key])]
        # All tasks have the same number of documents, so a mean over tasks is the mean over all their documents.
        a, b = (
            _values(folder, found[key].get("tasks", [task]), metric, filter_name)
            for folder, found in zip((first, second), metrics, strict=True)
        )
        if a.keys() != b.keys():
            raise UserError(f"{task} was run on different documents in {first} and {second}, so they cannot be paired")
        pair = np.array([[a[doc] for doc in a], [b[doc] for doc in a]], dtype=np.float64)
        ratio = metric == "bits_per_byte"

        def difference(pair: np.ndarray, ratio: bool = ratio) -> Any:
            means = bits_per_byte(pair) if ratio else pair.mean(-1)
            return means[1] - means[0]

        rng, n = np.random.default_rng(SEED), pair.shape[1]
        draws = [difference(pair[:, rng.integers(n, size=n)]) for _ in range(RESAMPLES)]
        low, high = np.quantile(draws, INTERVAL)
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        rows.append(
            f"| {task} | {name} | {values[0]:.4f} | {values[1]:.4f} | {difference(pair):+.4f} "
            f"| [{low:+.4f}, {high:+.4f}] | {n} |"
        )
    if len(rows) == 2:
        raise UserError(f"{first} and {second} have no metric in common")
    return "\n".join(rows) + "\n"


def _results(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no results.json: it is not a result folder of `lrnn eval`")
    metrics = json.loads(path.read_text(encoding="utf-8")).get("metrics")
    if metrics is None:
        raise UserError(
            f"{folder} is not a result folder of `lrnn eval`; `lrnn position` itself compares the models it is given"
        )
    return {(row["task"], row["metric"], row["filter"]): row for row in metrics}


def _values(folder: Path, tasks: list[str], metric: str, filter_name: str) -> dict[tuple[str, int, str], Any]:
    """Return the value of every document by (its task, its number, the hash of its text)."""
    found: dict[tuple[str, int, str], Any] = {}
    for task in tasks:
        with (folder / f"samples_{task}.jsonl").open("rb") as file:
            samples = [json.loads(line) for line in file]
        found |= {(task, s["doc_id"], s["doc_hash"]): s[metric] for s in samples if s["filter"] == filter_name}
    return found
