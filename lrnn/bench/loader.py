"""Measure how fast one process makes training batches of a corpus, in the random order of training."""

import argparse
import math
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.corpus.reader import FORMAT, FORMAT_VERSION, TokenCorpus
from lrnn.pretrain.corpus.shard_writer import ShardWriter
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.samples import CorpusData


def write_synthetic_corpus(path: Path, num_tokens: int, seed: int = 0) -> None:
    """Write a corpus of at least `num_tokens` random ids, in documents of log-normal length (mean 1,000)."""
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
    """Return the tokens per second that one process takes from a `Loader`, for each repeat of `seconds / repeats`."""
    corpus = TokenCorpus(corpus_path)
    data = CorpusData([corpus], [1.0], seq_len, seed=0, reset_at_document_boundaries=reset_at_document_boundaries)
    rates = []
    with Loader(data, Batching(global_batch_size, micro_batch_size)) as loader:
        for _ in range(4):  # skip the steps that are prepared before the clock starts, and the first ones after them
            next(loader)
        for _ in range(repeats):
            tokens = 0
            start = time.perf_counter()
            while (now := time.perf_counter()) - start < seconds / repeats:
                tokens += sum(batch.input_ids.numel() for batch in next(loader))
            rates.append(tokens / (now - start))
    return rates


def bench_data(args: argparse.Namespace) -> None:
    """Print the table of `lrnn bench data`. Raises UserError for an invalid size or time."""
    _check(args)
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


def _check(args: argparse.Namespace) -> None:
    for name in ("seq_len", "micro_batch_size", "global_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} should be at least 1")
    if not (args.seconds > 0 and math.isfinite(args.seconds)):
        raise UserError(f"--seconds {args.seconds:g} should be a positive number")
    Batching(args.global_batch_size, args.micro_batch_size)  # before a synthetic corpus is written


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
