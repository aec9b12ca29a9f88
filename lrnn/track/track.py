"""Train small models on state-tracking tasks, and report which of them track state at lengths not seen in training.

Trains a grid of tasks x models x eigenvalue ranges x seeds, on all GPUs, and several cells at once on each. The same
command resumes a grid that was stopped. A cell that has a result is not trained again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lrnn.errors import UserError, first_line
from lrnn.run_lock import RunLock
from lrnn.settings import dump
from lrnn.track.cell import train_cell
from lrnn.track.grid import Cell, GridConfig, load_grid
from lrnn.track.interleave import interleave
from lrnn.track.report import write_report
from lrnn.track.workers import run_on_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn track`."""
    parser.add_argument("config", help="YAML file of the grid")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the grid")
    parser.add_argument(
        "--device", default=None, help="one device, such as cuda:1 (default: all GPUs, or cpu if there is none)"
    )
    parser.epilog = "example:\n  lrnn track configs/track/parity.yaml out=runs/track/parity train.steps=5000"


def main(args: argparse.Namespace) -> int:
    grid, cells = load_grid(args.config, args.overrides)
    devices = _devices(args.device)
    out = Path(grid.out)
    with RunLock(out, "out"):
        (out / "grid.yaml").write_text(dump(grid))
        results: dict[Path, dict[str, Any]] = {}
        start = time.monotonic()
        for cell, result in _run(grid, cells, devices, lambda text: print(text, flush=True)):
            results[cell.folder] = result
            print(
                f"[{len(results)}/{len(cells)}] {cell}: scaled accuracy {result['scaled_accuracy']:.3f}  "
                f"({time.monotonic() - start:.0f} s)",
                flush=True,
            )
        table = write_report(grid, cells, [results[cell.folder] for cell in cells])
        print(f"\n{table}\nwrote {out}/table.md, results.csv and plots")
    return 0


def _devices(wanted: str | None) -> list[torch.device]:
    """Return the devices to train on. Raise UserError if the wanted one cannot be used."""
    if wanted is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    try:
        if torch.device(wanted).type not in ("cpu", "cuda"):
            raise UserError(f"--device {wanted} cannot be used: give cpu or cuda, or one GPU, such as cuda:1")
        device = torch.empty(0, device=wanted).device  # with its index
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {wanted} cannot be used: {first_line(error)}") from None
    return [device]


def _run(
    grid: GridConfig, cells: list[Cell], devices: list[torch.device], say: Callable[[str], None]
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Train the cells, and yield (cell, result) as each one ends."""
    at_once = grid.train.concurrent if devices[0].type == "cuda" else 1
    if len(devices) > 1:
        return run_on_devices(cells, devices, at_once, say)
    return interleave(cells, lambda cell: train_cell(cell, devices[0], at_once, say), at_once, devices[0])
