"""Train one model on one task and measure its accuracy by length: a cell of the grid, resumed if it was stopped."""

import json
import os
import pickle
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from lrnn.environment import describe_environment
from lrnn.errors import UserError
from lrnn.files import sync, write_atomically
from lrnn.pretrain.metrics.eigenvalues import EigenvalueProbe
from lrnn.records import DurableLines, utc_now
from lrnn.track.grid import Cell
from lrnn.track.interleave import Work, finished
from lrnn.track.measure import measure
from lrnn.track.training import Training, learning_rate, new_model

BLOCK = 50  # maximum steps in a piece of work


def train_cell(
    cell: Cell, device: torch.device, at_once: int = 1, say: Callable[[str], None] = print
) -> Work[dict[str, Any]]:
    """Train and test a cell unless its result exists. The value of the work is the result.

    Writes into `cell.folder`: `metrics.jsonl`, `state.pt` (from which a stopped cell resumes), `accuracy.csv` (by
    length) and, last, `result.json`. Samples are numbered consecutively, so the step is the whole state of the data.

    Args:
        cell: the cell.
        device: where to compute. On a GPU, a stream other than the default one must be current, the same in all pieces.
        at_once: how many cells share the device; recorded in the result.
        say: called with lines of progress.

    Raises:
        UserError: the folder holds a cell with other settings.
    """
    done = cell.folder / "result.json"
    if done.is_file():
        result = json.loads(done.read_text())
        _check_same(cell, result["fingerprint"])
        return result
    cell.folder.mkdir(parents=True, exist_ok=True)
    model = new_model(cell, device)
    probe = EigenvalueProbe(model)
    state = _saved_state(cell, device)
    steps, seconds = 0, 0.0  # over all stages, without the first steps of each
    for stage in range(state["stage"] if state else 0, len(cell.stages)):
        training = Training(cell, device, stage, model)
        if state:
            training.load(state)
            state = None
        timed = yield from _train(cell, training, probe, device, say)
        steps, seconds = steps + timed[0], seconds + timed[1]
    _save(cell, training)
    result = yield from measure(cell, model, device)
    speed = round(steps / seconds, 2) if steps else None
    result |= {"steps_per_second": speed, "concurrent": at_once, "environment": describe_environment(device)}
    write_atomically(done, json.dumps(result, indent=1))
    return result


def _train(
    cell: Cell, training: Training, probe: EigenvalueProbe, device: torch.device, say: Callable[[str], None]
) -> Work[tuple[int, float]]:
    """Do the remaining steps of a stage, with a record every `log_every` steps.

    The value of the work is (steps, seconds) after the first steps, which are slower.
    """
    settings = training.settings
    before = sum(earlier.steps for _, earlier in cell.stages[: training.stage])
    in_all = sum(each.steps for _, each in cell.stages)
    marked_at, marked_step = time.perf_counter(), training.step  # at the last record
    warm: tuple[float, int] | None = None  # time and step at the end of the first, slower steps
    saved_at = time.monotonic()
    with closing(DurableLines(cell.folder / "metrics.jsonl")) as log:
        while training.step < settings.steps:
            record_at = min((training.step // settings.log_every + 1) * settings.log_every, settings.steps)
            count = min(BLOCK, record_at - training.step, training.steps_until_drawing())
            is_recorded = training.step + count == record_at
            values: list[torch.Tensor] = []
            if is_recorded:
                training.run(count - 1)
                # The probe looks at the parameters before the step, in a pass of its own: all steps are the same.
                probe.arm()
                training.look()
                training.run(1)
                # The copies are queued before later steps overwrite the values, and complete when the piece is done.
                found = (training.take_losses(), training.loss, training.grad_norm, probe.counts())
                values = [x.to("cpu", non_blocking=True) for x in found if x is not None]
            else:
                training.run(count)
            yield finished(device)
            now = time.perf_counter()
            if is_recorded:
                speed = (training.step - marked_step) / (now - marked_at)
                record = {
                    "step": before + training.step,
                    "loss": values[0].item(),  # the mean since the last record
                    "loss_last": values[1].item(),
                    "lr": learning_rate(training.step - 1, settings),
                    "grad_norm": values[2].item(),
                    "steps_per_second": round(speed, 2),
                    "eigenvalues": probe.describe(values[3]) if len(values) > 3 else {},
                    "time": utc_now(),
                }
                if (error := log.write(json.dumps(record))) is not None:
                    say(f"{cell}: metrics.jsonl is not written: {error.strerror}; its lines wait for the next one")
                say(f"{cell}: step {record['step']}/{in_all}  loss {record['loss']:.4f}  {speed:.1f} steps/s")
                marked_at, marked_step = now, training.step
            if warm is None and training.is_warm:
                warm = now, training.step
            if time.monotonic() - saved_at > settings.checkpoint_seconds:
                _save(cell, training)
                saved_at = time.monotonic()
    if warm is None:
        return 0, 0.0
    return training.step - warm[1], time.perf_counter() - warm[0]


def _save(cell: Cell, training: Training) -> None:
    partial = cell.folder / ".state.pt.partial"
    torch.save(training.state() | {"fingerprint": cell.fingerprint}, partial)
    sync(partial)
    os.replace(partial, cell.folder / "state.pt")


def _saved_state(cell: Cell, device: torch.device) -> dict[str, Any] | None:
    """Return what `_save` wrote, or None if it has not. Raises UserError if that is damaged."""
    path = cell.folder / "state.pt"
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it is cut short"])[0]
        raise UserError(f"{path} is damaged ({reason}); remove it to train {cell} again") from None
    _check_same(cell, state["fingerprint"])
    return state


def _check_same(cell: Cell, fingerprint: str) -> None:
    if fingerprint != cell.fingerprint:
        raise UserError(
            f"{cell.folder} holds {cell} with another task, model, training or test than the grid has now; restore the "
            "grid, remove that folder, or choose another `out`"
        )
