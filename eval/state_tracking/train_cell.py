"""Train one model on one task, and measure it by length: a cell of the grid, resumed where it was stopped."""

import csv
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.state_tracking.counter_rng import split_seed
from lrnn.eval.state_tracking.grid import Cell, GridConfig, TrainSettings
from lrnn.eval.state_tracking.metrics import prefix_accuracy, scaled_accuracy
from lrnn.eval.state_tracking.task import IGNORE
from lrnn.pretrain.checkpoint import write_atomically
from lrnn.pretrain.engine import parameter_groups
from lrnn.pretrain.metrics import DurableLines, EigenvalueProbe

WARMUP = 0.1  # of the steps


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up over the first tenth, then a cosine to `min_lr`; `step` counts from 0."""
    warmup = max(1, round(WARMUP * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, settings.steps - warmup)
    return settings.min_lr + 0.5 * (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share))


def train_cell(cell: Cell, grid: GridConfig, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and test a cell, unless its result is there; returns the result.

    Writes into `cell.folder`: `metrics.jsonl`, `accuracy.csv` (by length) and, last, `result.json`; in between
    `state.pt`, from which a cell that was stopped goes on. Samples are numbered through: the state of the data is the
    step alone.
    """
    done = cell.folder / "result.json"
    if done.is_file():
        result = json.loads(done.read_text())
        _check_same(cell, result["fingerprint"])
        return result
    cell.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cell.seed)
    model = LrnnForCausalLM(cell.model_config).to(device).train()
    settings = grid.train
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.lr, fused=device.type == "cuda"
    )
    first = _resume(cell, model, optimizer, device)
    probe = EigenvalueProbe(model)
    log = DurableLines(cell.folder / "metrics.jsonl")
    seed = split_seed(cell.seed, "train")
    mark, saved_at, since = time.perf_counter(), time.monotonic(), first
    for step in range(first, settings.steps):
        logging = (step + 1) % settings.log_every == 0 or step + 1 == settings.steps
        indices = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
        batch = cell.task.batch(seed, indices, settings.min_length, settings.max_length, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        probe.enabled = logging
        loss = model(input_ids=batch.input_ids, shift_labels=batch.labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if logging:
            probe.enabled = False
            now = time.perf_counter()
            record = {"step": step + 1, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"]}
            record |= {"grad_norm": norm.item(), "steps_per_second": round((step + 1 - since) / (now - mark), 2)}
            record["eigenvalues"] = probe.read()
            log.write(json.dumps(record))
            say(f"{cell}: step {step + 1}/{settings.steps}  loss {record['loss']:.4f}  "
                f"{record['steps_per_second']:.1f} steps/s")  # fmt: skip
            mark, since = time.perf_counter(), step + 1
        if time.monotonic() - saved_at > settings.checkpoint_seconds:
            _save(cell, step + 1, model, optimizer)
            saved_at = time.monotonic()
    log.close()
    _save(cell, settings.steps, model, optimizer)
    result = measure(cell, grid, model, device)
    write_atomically(done, json.dumps(result, indent=1))
    return result


@torch.no_grad()
def measure(cell: Cell, grid: GridConfig, model: LrnnForCausalLM, device: torch.device) -> dict[str, Any]:
    """Accuracy over all test samples and by length; writes `accuracy.csv`.

    With one answer a sequence, a length is the size of the sequence. In word problems every position has an answer, and
    the accuracy at length t is the share of sequences that are right in every position up to t (arXiv 2411.12537,
    section 5.2); there the accuracy over all is that of all positions.
    """
    model.eval()
    settings, seed = grid.test, split_seed(cell.seed, "test")
    right: Tensor = torch.zeros(settings.max_length + 1, dtype=torch.float64)
    total: Tensor = torch.zeros(settings.max_length + 1, dtype=torch.float64)
    positions_right = positions = 0
    for start in range(0, settings.samples, settings.batch_size):
        indices = torch.arange(start, min(start + settings.batch_size, settings.samples))
        batch = cell.task.batch(seed, indices, settings.min_length, settings.max_length, device)
        predictions = model(input_ids=batch.input_ids).logits.argmax(-1)
        labelled = batch.labels != IGNORE
        correct = (predictions == batch.labels) & labelled
        positions_right += int(correct.sum())
        positions += int(labelled.sum())
        if bool((labelled.sum(1) == 1).all()):
            lengths = batch.lengths.cpu()
            total.index_add_(0, lengths, torch.ones(len(lengths), dtype=torch.float64))
            right.index_add_(0, lengths, correct.any(1).double().cpu())
        else:
            at = torch.arange(1, batch.labels.shape[1] + 1)
            counted = labelled.sum(0).double().cpu()
            total[at] += counted
            right[at] += prefix_accuracy(predictions, batch.labels).nan_to_num().cpu() * counted
    model.train()
    by_length = {n: float(right[n] / total[n]) for n in range(len(total)) if total[n] > 0}
    with (cell.folder / "accuracy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "accuracy", "sequences"])
        writer.writerows((n, f"{accuracy:.6f}", int(total[n])) for n, accuracy in by_length.items())
    accuracy = positions_right / positions
    floor = cell.task.majority_floor(settings.min_length, settings.max_length)
    return {
        "task": cell.task_name, "model": cell.model_name, "range": cell.range, "seed": cell.seed,
        "parameters": sum(p.numel() for p in model.parameters()), "steps": grid.train.steps, "accuracy": accuracy,
        "scaled_accuracy": scaled_accuracy(accuracy, cell.task.num_classes),
        "floor": floor, "scaled_floor": scaled_accuracy(floor, cell.task.num_classes),
        "by_length": by_length, "fingerprint": cell.fingerprint,
    }  # fmt: skip


def _save(cell: Cell, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = cell.folder / ".state.pt.partial"
    torch.save(state | {"fingerprint": cell.fingerprint}, partial)
    os.replace(partial, cell.folder / "state.pt")


def _resume(cell: Cell, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Load the state where there is one; returns the steps done."""
    path = cell.folder / "state.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    _check_same(cell, state["fingerprint"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _check_same(cell: Cell, fingerprint: str) -> None:
    if fingerprint != cell.fingerprint:
        raise UserError(
            f"{cell.folder} holds {cell} with another task, model, training or test than the grid has now; restore the "
            "grid, remove that folder, or choose another out"
        )
