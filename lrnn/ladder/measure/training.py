"""What the records of a run say: speed, memory, loss and spikes, and the eigenvalues of its layers over training."""

import statistics
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.ladder.results import Figure
from lrnn.pretrain.metrics.curves import split_records

Records = list[dict[str, Any]]


def training_facts(records: Records, at_once: int = 1) -> dict[str, Any]:
    """Return the facts of a training by the names of `lrnn.ladder.measures.FACTS`.

    The time is that from each start of the run to its last record before the next, so pauses between do not count.

    Args:
        records: of the run, from `read_metrics`.
        at_once: runs that share a GPU.

    Raises:
        UserError: they hold no step.
    """
    by_step, marked = split_records(records)
    steps = [record for record in by_step.values() if "loss" in record]
    if not steps:
        raise UserError("the records of the run hold no step, so nothing can be said of its training")
    seconds = [(processes, (last - first).total_seconds()) for processes, first, last in _spans(records)]
    speeds = [record["tokens_per_second_per_gpu"] * processes for record, processes in _with_processes(records)]
    return {
        "seconds": round(sum(span for _, span in seconds), 1),
        "gpu_seconds": round(sum(processes * span for processes, span in seconds) / at_once, 1),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "peak_gb": max(record["memory_gb"] for record in steps),
        "loss": steps[-1]["loss"],
        "spikes": len(marked["loss_spike"]),
        "skipped_steps": steps[-1]["skipped_steps"],
    }


def _spans(records: Records) -> Iterator[tuple[int, datetime, datetime]]:
    """Yield the number of processes and the first and last time of each start of the run."""
    processes, first, last = 0, None, None
    for record in records:
        time = datetime.fromisoformat(record["time"])
        if record.get("event") == "start":
            if first is not None and last is not None:
                yield processes, first, last
            processes, first = record["processes"], time
        last = time
    if first is not None and last is not None:
        yield processes, first, last


def _with_processes(records: Records) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the records that have a speed, each with the number of processes."""
    processes = 1
    for record in records:
        if record.get("event") == "start":
            processes = record["processes"]
        elif "event" not in record and "tokens_per_second_per_gpu" in record:
            yield record, processes


def eigenvalues(records: Records, count: int) -> list[Figure]:
    """Return the eigenvalues of each layer at steps spread over training: the share below 0, and two quantiles.

    Args:
        records: of the run, from `read_metrics`.
        count: number of steps: the last that was recorded, and others with equal distances as far as there are any.
    """
    by_step, _ = split_records(records)
    known = {step: record["eigenvalues"] for step, record in by_step.items() if record.get("eigenvalues")}
    if not known or not count:
        return []
    steps = np.array(list(known))
    wanted = np.linspace(steps[0], steps[-1], count) if count > 1 else steps[-1:]
    chosen = sorted({int(steps[np.abs(steps - step).argmin()]) for step in wanted})
    figures = []
    for step in chosen:
        noted = known[step]
        for (layer, negative), row in zip(noted["negative_fraction"].items(), noted["histogram"], strict=True):
            values = {"negative_eigenvalues": negative}
            values |= {"smallest_eigenvalue": quantile(row, 0.01), "median_eigenvalue": quantile(row, 0.5)}
            figures += [Figure(name, f"layer {layer}", step, value) for name, value in values.items()]
    return figures


def quantile(histogram: list[float], share: float) -> float:
    """Return a quantile of eigenvalues from the shares of equal bins over [-1, 1], each taken as filled evenly."""
    edges = np.linspace(-1, 1, len(histogram) + 1)
    filled = np.concatenate([[0.0], np.cumsum(histogram)])
    return float(np.interp(share * filled[-1], filled, edges))
