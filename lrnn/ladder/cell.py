"""One run of a ladder: train, export, measure, and write the result. What is done already is not done again."""

import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Self

import torch

from lrnn.errors import UserError
from lrnn.eval.export.read import read_checkpoint
from lrnn.eval.export.write import export, without_progress_bars
from lrnn.eval.result_folder import describe_environment
from lrnn.ladder import processes
from lrnn.ladder.cells import Cell
from lrnn.ladder.config import LadderConfig
from lrnn.ladder.kept import Kept, begin_training, settings_with_corpora
from lrnn.ladder.measure.measure import measure
from lrnn.ladder.measure.training import training_facts
from lrnn.ladder.results import CellResult, write_result
from lrnn.ladder.sizes import count_parameters
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.launch import STOP_SIGNALS, STOPPED, choose_threads, end_with_launcher
from lrnn.records import read_metrics
from lrnn.run_lock import RunLock

OWN = "cell"  # folder within the run's folder: the lock, the settings, the run's YAML file
LOG = "log.txt"


class Failed(Exception):
    """The training of a cell ended with an exit status other than 0, which `args` holds."""


def run_cell(ladder: LadderConfig, cell: Cell, redo: bool) -> int:
    """Run a cell in this process and a child that trains. Return the exit status; 75 if a signal stopped it.

    Args:
        redo: replace a result, and a training, of other settings.

    Raises:
        UserError: the result or the training is of other settings, or something else runs the cell.
    """
    with _Stopping() as stopping:
        end_with_launcher()
        choose_threads()
        with RunLock(cell.run_dir / OWN):
            kept = Kept.of([cell])
            if kept.done:
                print(f"{cell} has a result: {cell.result_folder}", flush=True)
                return 0
            if not redo:
                kept.refuse_changed()
            settings = settings_with_corpora(cell)
            if begin_training(cell, settings):
                if not redo:
                    raise UserError(
                        f"{cell.run_dir} holds a training of {cell} with other settings; remove it, or add --redo"
                    )
                _clear(cell.run_dir)
                begin_training(cell, settings)
            try:
                folder = _trained_and_exported(cell, stopping)
            except Failed as failed:
                return int(failed.args[0])
            write_result(cell.result_folder, _measured(ladder, cell, folder))
            _tidy(cell.run_dir, ladder.keep)
            print(f"wrote {cell.result_folder}", flush=True)
            return 0


class _Stopping:
    """Within a `with` block, a stop signal ends this process with status 75, or the child that it waits for first."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._stopped = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait_for(self, child: subprocess.Popen) -> int:
        """Return the exit status of a child; stop signals are passed on to it meanwhile."""
        self._child = child
        status = child.wait()
        self._child = None
        if self._stopped:
            raise SystemExit(STOPPED)
        return status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._child is None:
            raise SystemExit(STOPPED)
        self._child.send_signal(number)


def _trained_and_exported(cell: Cell, stopping: _Stopping) -> Path:
    """Return the exported model of a cell. Raises Failed if its training did not end well."""
    folder = cell.run_dir / "hf"
    if (folder / "config.json").is_file():  # the folder appears whole
        print(f"{folder} is there already", flush=True)
        return folder
    if not _is_trained(cell):
        file = cell.run_dir / OWN / "run.yaml"
        processes.write_settings(cell.config, file)
        status = stopping.wait_for(processes.start(["pretrain", str(file)]))
        if status != 0:
            raise Failed(128 - status if status < 0 else status)
    without_progress_bars()
    export(read_checkpoint(cell.run_dir), folder)
    return folder


def _is_trained(cell: Cell) -> bool:
    saved = checkpoint.list_checkpoints(cell.run_dir)
    return bool(saved) and checkpoint.step_of(saved[-1]) >= cell.steps and checkpoint.looks_whole(saved[-1])


def _measured(ladder: LadderConfig, cell: Cell, folder: Path) -> CellResult:
    """Measure an exported model, and return the result of its cell."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    figures, documents = measure(cell.run_dir, folder, ladder.measure, device, lambda text: print(text, flush=True))
    measuring = {"measuring_gpu_seconds": round((time.monotonic() - start) * cell.gpus / cell.at_once, 1)}
    records = read_metrics(cell.run_dir)
    parameters, non_embedding = count_parameters(cell.model)
    return CellResult(
        name=cell.name,
        size=cell.size,
        arm=cell.arm,
        range=cell.range,
        seed=cell.seed,
        tokens=cell.tokens,
        lr=cell.lr,
        parameters=parameters,
        non_embedding_parameters=non_embedding,
        steps=cell.steps,
        tokens_per_step=cell.tokens_per_step,
        settings=cell.settings,
        corpora=cell.corpora(),
        figures=tuple(figures),
        training=training_facts(records, cell.at_once) | measuring,
        environment=describe_environment(device),
        documents=documents,
        metrics=records,
    )


def _clear(run_dir: Path) -> None:
    """Remove a training, once nothing writes to it any more."""
    with RunLock(run_dir):
        for path in run_dir.iterdir():
            if path.name == OWN:
                (path / "settings.json").unlink(missing_ok=True)
            elif path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOG and not path.name.startswith("."):
                path.unlink()


def _tidy(run_dir: Path, keep: str) -> None:
    """Remove what is not kept of a run that has a result; see `LadderConfig.keep`."""
    if keep == "export" and (run_dir / "checkpoints").exists():
        shutil.rmtree(run_dir / "checkpoints")
    elif keep == "nothing":
        _clear(run_dir)
