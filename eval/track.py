"""Train small models on state-tracking tasks, and report which of them track state at lengths they have not seen.

Trains a grid of tasks x models x eigenvalue ranges x seeds. A grid that was stopped goes on where it was, by the same
command; a cell whose result is there is not trained again.
"""

import argparse
import time
from pathlib import Path

import torch

from lrnn.errors import UserError
from lrnn.eval.state_tracking.grid import load_grid
from lrnn.eval.state_tracking.report import write_report
from lrnn.eval.state_tracking.train_cell import train_cell
from lrnn.pretrain.config import dump_config
from lrnn.pretrain.run_lock import RunLock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lrnn track`."""
    parser.add_argument("config", help="YAML file of the grid")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the grid")
    parser.add_argument("--device", default=None, help="default: cuda where there is a GPU, else cpu")
    parser.epilog = "example:\n  lrnn track configs/track/parity.yaml out=runs/track/parity train.steps=5000"


def main(args: argparse.Namespace) -> int:
    grid, cells = load_grid(args.config, args.overrides)
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    out = Path(grid.out)
    with RunLock(out):
        (out / "grid.yaml").write_text(dump_config(grid))
        results = []
        start = time.monotonic()
        for i, cell in enumerate(cells):
            results.append(train_cell(cell, grid, device, lambda text: print(text, flush=True)))
            score = results[-1]["scaled_accuracy"]
            print(f"[{i + 1}/{len(cells)}] {cell}: scaled accuracy {score:.3f}  ({time.monotonic() - start:.0f} s)")
        print(f"\n{write_report(grid, cells, results)}\nwrote {out}/table.md, results.csv and pictures")
    return 0
