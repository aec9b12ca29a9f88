"""Say what a run takes before it is started: GPU memory by part, speed, days, and what would be faster.

No GPU is needed: everything is computed from the configuration. The configured micro-batch, recomputation and ZeRO
stage are shown beside the fastest ones that fit in the memory. With several numbers of GPUs, the three ZeRO stages are
compared on each of them. docs/planning.md says how the figures are computed, and how near they were to measured ones.
"""

import argparse
import json
import math
from dataclasses import replace

from lrnn.errors import UserError
from lrnn.pretrain.gpus import GPUS, find_gpu

GPUS_PER_NODE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn plan`."""
    parser.add_argument("config", help="YAML file of the run, or its name")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument(
        "--gpus", type=_counts, default=[1], metavar="N[,N...]", help="number of GPUs, or several (default 1)"
    )
    names = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", default="H100", metavar="NAME", help=f"kind of GPU (default H100): {names}")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="memory of a GPU; default that of its kind")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=GPUS_PER_NODE,
        metavar="N",
        help=f"GPUs of a node (default {GPUS_PER_NODE})",
    )
    parser.add_argument(
        "--link-gbs",
        type=float,
        metavar="GB/S",
        help="bus bandwidth of collectives in a node, as nccl-tests print it; default two thirds of the link's rate",
    )
    parser.add_argument(
        "--node-link-gbs",
        type=float,
        metavar="GB/S",
        help="the same between nodes, for all network cards of a node; default 45 per GPU of a node",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.epilog = (
        "examples:\n"
        "  lrnn plan 1.3b --gpus 8 --gpu H100\n"
        "  lrnn plan 1.3b zero=3 data.seq_len=8192 global_batch_size=256 --gpus 64 --gpu H200\n"
        "  lrnn plan 1.3b --gpus 1,2,8,64,256 --node-link-gbs 45"
    )


def main(args: argparse.Namespace) -> int:
    """Print the plan of a run. Raises UserError for a bad configuration, GPU or number."""
    _check(args)
    gpu = find_gpu(args.gpu)
    # Here, because they import torch.
    from lrnn.pretrain.config import load_config
    from lrnn.pretrain.plan.setup import Links
    from lrnn.pretrain.plan.stages import plan_of

    config = load_config(args.config, args.overrides)
    links = Links.of(gpu, args.gpus_per_node)
    if args.link_gbs is not None:
        links = replace(links, inside=1e9 * args.link_gbs)
    if args.node_link_gbs is not None:
        links = replace(links, between=1e9 * args.node_link_gbs)
    capacity = 1e9 * (gpu.memory if args.memory_gb is None else args.memory_gb)
    record, text = plan_of(config, gpu, args.gpus, args.gpus_per_node, links, capacity)
    print(json.dumps(record, indent=2) if args.json else text)
    return 0


def _counts(text: str) -> list[int]:
    """Parse `--gpus`: numbers, separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number of GPUs, or several with commas") from None


def _check(args: argparse.Namespace) -> None:
    for count in args.gpus:
        if count < 1:
            raise UserError(f"--gpus {count} should be at least 1")
    if args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {args.gpus_per_node} should be at least 1")
    for name in ("memory_gb", "link_gbs", "node_link_gbs"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value:g} should be a positive number")
