"""Measure parts of the training path.

`lrnn bench data` measures how fast one process makes training batches of a corpus, in the random order of training;
`lrnn bench loop` how much of a training step passes outside of forward, backward and update; `lrnn bench kernels` the
delta-rule kernels and, with --model, a step of whole models, beside those of flash-linear-attention and FlashQLA.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

EXAMPLES = """\
examples:
  lrnn bench data
  lrnn bench data --corpus corpora/linux --seq-len 8192 --micro-batch-size 4
  lrnn bench loop configs/340m.yaml global_batch_size=16
  lrnn bench kernels --shapes 8x4096 2x4096 --breakdown
  lrnn bench kernels --model --json kernels.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lrnn bench`: one subcommand for each part that is measured."""
    parser.epilog = EXAMPLES
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    data = parts.add_parser("data", help="tokens per second of the data loader in one process")
    data.add_argument(
        "--corpus", type=Path, metavar="DIR", help="default: a synthetic one of 200M tokens, kept for the run"
    )
    data.add_argument("--seq-len", type=int, default=2048, help="tokens of a sample (default 2048)")
    data.add_argument("--micro-batch-size", type=int, default=8, help="samples of a micro-batch (default 8)")
    data.add_argument("--global-batch-size", type=int, default=64, help="samples of a step (default 64)")
    data.add_argument("--seconds", type=float, default=5.0, help="of each of the measurements (default 5)")

    loop = parts.add_parser("loop", help="what the training loop costs beside forward, backward and update")
    loop.add_argument("run", metavar="CONFIG", help="YAML file of a run")
    loop.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    loop.add_argument("--steps", type=int, default=30, help="of each of the measurements (default 30)")

    kernels = parts.add_parser("kernels", help="the delta-rule kernels on a GPU, beside fla's and FlashQLA's")
    shapes = ["8x4096", "4x4096", "1x32768", "2x4096"]
    kernels.add_argument("--shapes", nargs="+", default=shapes, metavar="BxT", help=f"default: {' '.join(shapes)}")
    kernels.add_argument("--heads", type=int, default=16, help="default 16")
    kernels.add_argument("--head-size", type=int, default=128, help="of keys and values (default 128)")
    kernels.add_argument("--only-ours", action="store_true", help="leave out the peers, whose first calls take minutes")
    kernels.add_argument("--breakdown", action="store_true", help="also the time of each of our kernels")
    kernels.add_argument("--model", action="store_true", help="also a training step of whole models, ours and fla's")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def write_synthetic_corpus(path: Path, num_tokens: int, seed: int = 0) -> None:
    """Write a corpus of at least `num_tokens` random ids, in documents of log-normal length (mean 1,000)."""
    import numpy as np

    from lrnn.files import write_json
    from lrnn.pretrain.corpus.reader import FORMAT, FORMAT_VERSION
    from lrnn.pretrain.corpus.shard_writer import ShardWriter

    random = np.random.default_rng(seed)
    vocab_size, written = 32000, 0
    shards: list[dict] = []
    (path / "train").mkdir(parents=True)
    while written < num_tokens:
        name = f"train/data-{len(shards):05d}.arrow"
        writer = ShardWriter(path / name, "uint16")
        shard_stop = min(num_tokens, written + (1 << 25))
        while written < shard_stop:
            lengths = np.clip(random.lognormal(6.3, 1.1, size=500).astype(np.int64), 3, 1 << 16)
            ids = random.integers(3, vocab_size, size=int(lengths.sum()), dtype=np.uint16)
            ends = np.cumsum(lengths)
            ids[ends - lengths], ids[ends - 1] = 1, 2
            writer.write_flat(ids, lengths)
            written += len(ids)
        shards.append({"file": name, **writer.close()})
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": "uint16",
        "tokenizer": {
            "kind": "none",
            "fingerprint": "0" * 64,
            "vocab_size": vocab_size,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "splits": {
            "train": {
                "documents": sum(shard["documents"] for shard in shards),
                "tokens": sum(shard["tokens"] for shard in shards),
                "shards": shards,
            }
        },
    }
    write_json(path / "manifest.json", manifest)


def measure_loader(
    corpus_path: Path,
    seq_len: int,
    micro_batch_size: int,
    global_batch_size: int,
    seconds: float,
    reset_at_document_boundaries: bool,
    repeats: int = 5,
) -> list[float]:
    """Tokens per second that one process takes from a `Loader`, of each repeat; one lasts `seconds / repeats`."""
    from lrnn.pretrain.batching import Batching
    from lrnn.pretrain.corpus.reader import TokenCorpus
    from lrnn.pretrain.data.loader import Loader
    from lrnn.pretrain.data.samples import CorpusData

    corpus = TokenCorpus(corpus_path)
    data = CorpusData([corpus], [1.0], seq_len, seed=0, reset_at_document_boundaries=reset_at_document_boundaries)
    rates = []
    with Loader(data, Batching(global_batch_size, micro_batch_size)) as loader:
        for _ in range(4):  # the steps that were prepared before the clock started, and the first ones after
            next(loader)
        for _ in range(repeats):
            tokens = 0
            start = time.perf_counter()
            while (now := time.perf_counter()) - start < seconds / repeats:
                tokens += sum(batch.input_ids.numel() for batch in next(loader))
            rates.append(tokens / (now - start))
    return rates


def bench_data(args: argparse.Namespace) -> None:
    """Print the table of `lrnn bench data`."""
    from importlib.metadata import version

    from lrnn.pretrain.corpus.reader import TokenCorpus

    with tempfile.TemporaryDirectory(prefix="lrnn-bench-") as temporary:
        path = args.corpus
        if path is None:
            path = Path(temporary) / "corpus"
            print("writing a synthetic corpus of 200M tokens", flush=True)
            write_synthetic_corpus(path, 200_000_000)
        print(repr(TokenCorpus(path)))
        print(
            f"{platform.node()}, {_cpu_name()}, {len(os.sched_getaffinity(0))} cores; "
            f"Python {platform.python_version()}, "
            + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "pyarrow"))
        )
        print(
            f"one process, random windows of {args.seq_len} tokens, micro-batches of {args.micro_batch_size}, "
            f"steps of {args.global_batch_size}"
        )
        print(f"{'million tokens/s':24} {'min':>8} {'median':>8} {'max':>8}")
        for name, reset in [("documents run on", False), ("reset at documents", True)]:
            rates = measure_loader(
                path, args.seq_len, args.micro_batch_size, args.global_batch_size, args.seconds, reset
            )
            row = [min(rates), statistics.median(rates), max(rates)]
            print(f"{name:24} " + " ".join(f"{rate / 1e6:8.1f}" for rate in row), flush=True)


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(args: argparse.Namespace) -> int:
    """Run the measurement that `args.part` names."""
    if args.part == "data":
        bench_data(args)
    elif args.part == "kernels":
        from lrnn.bench.kernels import bench_kernels

        bench_kernels(args)
    else:
        from lrnn.bench.loop import bench_loop

        bench_loop(args.run, args.overrides, args.steps)
    return 0
