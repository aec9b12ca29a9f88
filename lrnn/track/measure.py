"""Measure the accuracy of a trained model, over all test samples and by length."""

import csv
from typing import Any

import torch
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.track.grid import Cell
from lrnn.track.interleave import Work, finished
from lrnn.track.metrics import prefix_accuracy, scaled_accuracy
from lrnn.track.tasks.base import IGNORE
from lrnn.track.tasks.counter_rng import split_seed

# These are the maximum tokens of a forward pass, unless one sequence is longer. They fill a GPU, or fit a CPU's caches.
TEST_TOKENS = {"cuda": 2**17, "cpu": 2**13}


def measure(cell: Cell, model: LrnnForCausalLM, device: torch.device) -> Work[dict[str, Any]]:
    """Test a model, one batch per piece of work, and write `accuracy.csv`.

    The value of the work is the result, without the speed of training. If a sequence has one answer, a length is the
    size of a sequence. In word problems every position has an answer: the accuracy at length t is the share of
    sequences that are right at every position up to t (arXiv 2411.12537, section 5.2), and the overall accuracy is
    that of all positions.
    """
    settings, seed = cell.test, split_seed(cell.seed, "test")
    batch_size = min(
        settings.batch_size, max(1, TEST_TOKENS["cuda" if device.type == "cuda" else "cpu"] // settings.max_length)
    )
    # Sums stay on the device, because reading one back would wait for the batch.
    right, total = torch.zeros(2, settings.max_length + 1, dtype=torch.float64, device=device)
    positions = torch.zeros(2, dtype=torch.int64, device=device)  # right ones, all
    model.eval()
    for start in range(0, settings.samples, batch_size):
        indices = torch.arange(start, min(start + batch_size, settings.samples))
        batch = cell.task.batch(seed, indices, settings.min_length, settings.max_length, device)
        with torch.no_grad():
            predictions = model(input_ids=batch.input_ids, use_cache=False).logits.argmax(-1)
        labelled = batch.labels != IGNORE
        correct = (predictions == batch.labels) & labelled
        positions += torch.stack([correct.sum(), labelled.sum()])
        if cell.task.answers_along_the_way:
            counted = labelled.sum(0).double()
            total[1:] += counted
            right[1:] += (prefix_accuracy(predictions, batch.labels).nan_to_num() * counted).round()
        else:
            total.index_add_(0, batch.lengths, torch.ones_like(batch.lengths, dtype=torch.float64))
            right.index_add_(0, batch.lengths, correct.any(1).double())
        yield finished(device)
    model.train()
    by_length = _write_accuracy(cell, right, total)
    positions_right, positions_all = positions.tolist()
    accuracy = positions_right / positions_all
    floor = cell.task.majority_floor(settings.min_length, settings.max_length)
    return {
        "task": cell.task_name, "model": cell.model_name, "range": cell.range, "seed": cell.seed,
        "parameters": sum(p.numel() for p in model.parameters()), "steps": cell.train.steps, "accuracy": accuracy,
        "scaled_accuracy": scaled_accuracy(accuracy, cell.task.num_classes),
        "floor": floor, "scaled_floor": scaled_accuracy(floor, cell.task.num_classes),
        "by_length": by_length, "fingerprint": cell.fingerprint,
    }  # fmt: skip


def _write_accuracy(cell: Cell, right: Tensor, total: Tensor) -> dict[str, float]:
    """Write `accuracy.csv`, and return the accuracy of every length that occurs, with keys as JSON has them."""
    sums = enumerate(zip(right.tolist(), total.tolist(), strict=True))
    rows = [(n, r / t, round(t)) for n, (r, t) in sums if t > 0]
    with (cell.folder / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "accuracy", "sequences"])
        writer.writerows((n, f"{accuracy:.6f}", count) for n, accuracy, count in rows)
    return {str(n): accuracy for n, accuracy, _ in rows}
