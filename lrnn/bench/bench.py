"""Measure parts of the training path.

`lrnn bench data` measures how fast one process makes training batches of a corpus, in the random order of training.
`lrnn bench loop` measures how much of a training step is spent outside of forward, backward and update. `lrnn bench
step` shows where the time within them goes on a GPU, beside flash-linear-attention's model of the same shape. `lrnn
bench kernels` measures the delta-rule kernels beside those of flash-linear-attention and FlashQLA.
"""

import argparse
import os
from pathlib import Path

from lrnn.errors import UserError

EXAMPLES = """\
examples:
  lrnn bench data
  lrnn bench data --corpus corpora/linux --seq-len 8192 --micro-batch-size 4
  lrnn bench loop configs/340m.yaml global_batch_size=16
  lrnn bench kernels --shapes 8x4096 2x4096 --breakdown
  lrnn bench kernels --heads 30 --head-size 96 --value-size 192 --json kernels.json
  lrnn bench step configs/340m.yaml
  lrnn bench step configs/1.3b.yaml precision=fp8 --only-ours --verbose
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn bench`, with one subcommand for each part that is measured."""
    parser.epilog = EXAMPLES
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    data = parts.add_parser("data", help="tokens per second of the data loader in one process")
    data.add_argument(
        "--corpus", type=Path, metavar="DIR", help="corpus to read; default: a temporary synthetic one of 200M tokens"
    )
    data.add_argument("--seq-len", type=int, default=2048, help="tokens per sample (default 2048)")
    data.add_argument("--micro-batch-size", type=int, default=8, help="samples per micro-batch (default 8)")
    data.add_argument("--global-batch-size", type=int, default=64, help="samples per step (default 64)")
    data.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement (default 5)")

    loop = parts.add_parser("loop", help="time of a training step outside of forward, backward and update")
    loop.add_argument("run", metavar="CONFIG", help="YAML file of a run")
    loop.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    loop.add_argument("--steps", type=int, default=30, help="steps per measurement (default 30)")

    step = parts.add_parser("step", help="a training step by kinds of computation on GPUs, beside fla's model")
    step.add_argument("run", metavar="CONFIG", help="YAML file of a run; its corpora are not read")
    step.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    step.add_argument("--only-ours", action="store_true", help="leave out fla, whose first step takes minutes")
    step.add_argument("--verbose", action="store_true", help="also print the time of each kernel, and its kind")
    step.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")

    kernels = parts.add_parser("kernels", help="the delta-rule kernels on a GPU, beside fla's and FlashQLA's")
    shapes = ["8x4096", "4x4096", "1x32768", "2x4096"]
    kernels.add_argument(
        "--shapes",
        nargs="+",
        default=shapes,
        metavar="BxT",
        help=f"batch sizes and lengths (default {' '.join(shapes)})",
    )
    kernels.add_argument("--heads", type=int, default=16, help="heads (default 16)")
    kernels.add_argument("--head-size", type=int, default=128, help="size of keys and values per head (default 128)")
    kernels.add_argument("--value-heads", type=int, help="value heads, a multiple of --heads (default --heads)")
    kernels.add_argument("--value-size", type=int, help="size of values per head (default --head-size)")
    kernels.add_argument("--only-ours", action="store_true", help="leave out the peers, whose first calls take minutes")
    kernels.add_argument(
        "--only", nargs="+", metavar="NAME", help="measure these alone: lrnn, 'lrnn split', 'lrnn save_states'"
    )
    kernels.add_argument("--breakdown", action="store_true", help="also print the time of each of our kernels")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def main(args: argparse.Namespace) -> int:
    """Run the measurement that `args.part` names.

    Raises:
        UserError: the file of `--json` cannot be written; see also the measurements.
    """
    file = getattr(args, "json", None)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"--json {file}: the folder {file.parent} does not exist; create it first")
    if file is not None and file.is_dir():
        raise UserError(f"--json {file}: it is a folder; name a file")
    if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--json {file} cannot be written; name another file")
    if args.part == "data":
        from lrnn.bench.loader import bench_data

        bench_data(args)
    elif args.part == "kernels":
        from lrnn.bench.kernels import bench_kernels

        bench_kernels(args)
    elif args.part == "step":
        from lrnn.bench.step import bench_step

        bench_step(args)
    else:
        from lrnn.bench.loop import bench_loop

        bench_loop(args.run, args.overrides, args.steps)
    return 0
