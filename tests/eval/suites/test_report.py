"""Test standard errors and paired comparison against closed forms and known truth."""

import json
import math

import numpy as np
import pytest

from lrnn.errors import UserError
from lrnn.eval import statistics
from lrnn.eval.suites import report
from lrnn.eval.suites.compare import compare


def documents(n, seed, bits=2.0):
    """Return (log-likelihood, bytes) of n documents of unequal length whose bits per byte scatter around `bits`."""
    rng = np.random.default_rng(seed)
    n_bytes = rng.integers(50, 500, size=n)
    nats = -n_bytes * (bits + rng.normal(0, 0.3, size=n)) * math.log(2)
    return np.stack([nats, n_bytes], axis=-1).astype(np.float64)


def test_bits_per_byte_is_a_ratio_of_sums():
    pairs = np.array([[-8 * math.log(2), 4], [-2 * math.log(2), 1]])
    assert statistics.bits_per_byte(pairs) == pytest.approx(10 / 5)


def test_bootstrap_error_is_the_scatter_over_fresh_samples():
    estimates = [statistics.bits_per_byte(documents(200, seed)) for seed in range(1000, 1400)]
    errors = [statistics.bootstrap_stderr("bits_per_byte", documents(200, seed)) for seed in range(10)]
    assert np.mean(errors) == pytest.approx(np.std(estimates, ddof=1), rel=0.1)
    assert statistics.bootstrap_stderr("bits_per_byte", documents(200, 0)) == errors[0], (
        "the same for the same documents"
    )
    assert statistics.bootstrap_stderr("bits_per_byte", documents(1, 0)) is None


def test_the_error_of_a_metric_that_is_named_like_another():
    """A mean that a task calls perplexity keeps lm-eval's error, and a document may have no value."""
    raw = {
        "samples": {"t": [{"filter": "none", "perplexity": x} for x in (1.0, 3.0)] + [{"filter": "none"}]},
        "configs": {"t": {}},
        "n-shot": {"t": 0},
        "higher_is_better": {"t": {"perplexity": False}},
        "n-samples": {"t": {"effective": 3}},
    }
    errors = []
    for value in (2.0, math.exp(-2.0)):
        results = {"t": {"perplexity,none": value, "perplexity_stderr,none": 0.5}}
        (row,) = report.metric_rows({**raw, "results": results})
        errors.append(row["stderr"])
    assert errors == [0.5, statistics.bootstrap_stderr("perplexity", np.array([1.0, 3.0]))] and errors[1] != 0.5


@pytest.mark.parametrize("values", [[], [1.0, 3.0], ["a", "b"], [[1.0, 2.0], [3.0]], [{}, {}]])
def test_values_that_are_not_of_the_metrics_form(values):
    assert not statistics.is_aggregate("bits_per_byte", values, 2.0)
    assert statistics.is_aggregate("bits_per_byte", [[-2 * math.log(2), 1], [-2 * math.log(2), 1]], 2.0)


def write_results(folder, pairs, doc_hash="h"):
    folder.mkdir()
    value = float(statistics.bits_per_byte(pairs))
    row = {"task": "t", "metric": "bits_per_byte", "filter": "none", "value": value}
    (folder / "results.json").write_text(json.dumps({"metrics": [row]}))
    samples = [
        {"doc_id": i, "doc_hash": f"{doc_hash}{i}", "filter": "none", "bits_per_byte": pair}
        for i, pair in enumerate(pairs.tolist())
    ]
    (folder / "samples_t.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def test_paired_comparison_sees_a_difference_smaller_than_either_error(tmp_path):
    first = documents(300, 0)
    noise = np.random.default_rng(1).normal(0, 0.001, size=300)
    second = first.copy()
    second[:, 0] -= first[:, 1] * (0.005 + noise) * math.log(2)  # 0.005 bits per byte worse on every document
    write_results(tmp_path / "a", first)
    write_results(tmp_path / "b", second)
    assert statistics.bootstrap_stderr("bits_per_byte", first) > 0.01
    cells = compare(tmp_path / "a", tmp_path / "b").splitlines()[-1].split("|")
    low, high = json.loads(cells[6].replace("+", ""))
    assert float(cells[5]) == pytest.approx(0.005, abs=2e-4) and 0.004 < low < 0.005 < high < 0.006


def test_only_the_same_documents_can_be_compared(tmp_path):
    write_results(tmp_path / "a", documents(10, 0))
    write_results(tmp_path / "b", documents(10, 0), doc_hash="other")
    with pytest.raises(UserError, match="was run on different documents"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match=r"no results\.json"):
        compare(tmp_path / "a", tmp_path)


def test_a_mean_over_documents_of_tasks_and_metrics_that_are_none(tmp_path):
    sizes = {"small": [1.0, 0.0], "large": [1.0] * 6}
    for name, change in (("a", 0.0), ("b", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        values = {task: [value - change for value in of_task] for task, of_task in sizes.items()}
        for task, of_task in values.items():
            rows = [
                {"doc_id": i, "doc_hash": "h", "filter": "none", "acc": value, "bleu": ["text", "other"]}
                for i, value in enumerate(of_task)
            ]
            (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        both = {"metric": "acc", "filter": "none", "tasks": list(sizes)}
        over_tasks = np.mean([np.mean(of_task) for of_task in values.values()])
        over_documents = np.mean(np.concatenate(list(values.values())))
        metrics = [
            {**both, "task": "by_task", "value": over_tasks, "weight_by_size": False},
            {**both, "task": "by_document", "value": over_documents, "weight_by_size": True},
            {"task": "small", "metric": "bleu", "filter": "none", "value": 12.5},
        ]
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
    *lines, blank, note = compare(tmp_path / "a", tmp_path / "b").splitlines()[2:]
    assert not blank and note.endswith("their values do not follow from those of documents: small bleu.")
    assert [line.split("|")[1:6] for line in lines] == [
        [" by_task ", " acc ", " 0.7500 ", " 0.2500 ", " -0.5000 "],
        [" by_document ", " acc ", " 0.8750 ", " 0.3750 ", " -0.5000 "],
    ]
