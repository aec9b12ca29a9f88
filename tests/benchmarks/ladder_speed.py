"""Measure the training of a ladder's sizes on one GPU: fused layers and plain ones, one run and two at a time, graphs.

    python tests/benchmarks/ladder_speed.py configs/ladder/ranges.yaml CORPUS WORK [--sizes 15m 30m] [--steps 60]

Each size is trained by `lrnn pretrain`'s own loop on the corpus, its whole batch as one micro-batch, for so many steps.
Its vocabulary should not be larger than the ladder's. Figures are medians of records of 5 steps, the first two left
out, in thousand tokens per second: of a run, and of all that run at that time. One process computes all runs of a kind,
so that nothing starts twice, and two of them begin each run together.

"graph" is no run of the loop. It says what a loop could reach that launches a step as one CUDA graph: forward and
backward pass, clipping, AdamW, and the copies of the weights, without DeepSpeed, data and metrics. "launched" is the
same step without a graph.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from lrnn.bench.step import random_batches
from lrnn.ladder.cells import load_ladder
from lrnn.pretrain.config import Config, load_model_of, parse_config
from lrnn.pretrain.data.micro_batch import model_inputs
from lrnn.pretrain.distributed import Ranks, init_ranks
from lrnn.pretrain.engine import build_model
from lrnn.pretrain.fused.layers import fuse, refresh
from lrnn.pretrain.launch import StopRequest, free_port, local_environment
from lrnn.pretrain.metrics.flops import peak_flops, train_flops_per_token
from lrnn.pretrain.optim import parameter_groups
from lrnn.pretrain.train import train
from lrnn.records import read_metrics
from lrnn.settings import dump

EVERY = 5  # steps per record
SETTLING = 3  # steps before one is captured
FORMS = ("fused", "plain", "two fused", "two plain", "launched", "graph")


def config_of(cell_config: Config, corpus: Path, work: Path, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a ladder's run as one that is measured: another corpus, its whole batch at once, and nothing beside."""
    raw = yaml.safe_load(dump(cell_config))
    raw |= {"run_dir": str(work), "steps": steps, "micro_batch_size": raw["global_batch_size"], **changes}
    raw["data"] |= {"corpora": [{"path": str(corpus)}]}
    raw["schedule"] = {"warmup_steps": 10}
    raw["checkpoint"] = {"every": 10**6}
    raw["log"] |= {"every": EVERY, "heldout_every": 0, "tensorboard": False}
    return raw


def run_all(configs: list[dict[str, Any]], barrier: Any, environment: dict[str, str]) -> None:
    """Train one after the other, as one of the processes that share the GPU."""
    os.environ.update(environment)
    ranks = init_ranks()
    for raw in configs:
        barrier.wait()
        with StopRequest() as stop:
            train(parse_config(raw, "ladder_speed"), ranks, stop)
        _free()


def train_together(configs: list[list[dict[str, Any]]]) -> None:
    """Train lists of runs at the same time, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(configs))
    processes = [
        context.Process(target=run_all, args=(own, barrier, local_environment(0, 1, free_port()))) for own in configs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"processes ended with {[process.exitcode for process in processes]}")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the medians of a run's records."""
    records = [r for r in read_metrics(folder) if "loss" in r][2:]
    keys = ("step_seconds", "tokens_per_second_per_gpu", "loop_seconds")
    found = {key: statistics.median(r[key] for r in records) for key in keys}
    found |= {"mfu": statistics.median(r["mfu"] or 0 for r in records), "gb": max(r["memory_gb"] for r in records)}
    return found | {"loss": records[-1]["loss"]}


def step_alone(config: Config, device: torch.device) -> tuple[Callable[[], None], torch.nn.Module]:
    """Return a function that computes a training step of random tokens without DeepSpeed, and the model.

    It may be captured.
    """
    model_config = load_model_of(config)
    model = build_model(model_config, config.seed, activation_checkpointing=False).to(device)
    if device.type == "cuda":
        fuse(model, torch.bfloat16)
    batch = random_batches(config, model_config.vocab_size, Ranks(0, 1, device, None))[0]  # type: ignore[arg-type]
    inputs = model_inputs(batch, device)
    share = torch.tensor(batch.num_labels, device=device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=torch.tensor(config.optim.lr, device=device),
        betas=tuple(config.optim.betas), fused=True, capturable=device.type == "cuda",
    )  # fmt: skip

    def step() -> None:
        refresh(model)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = model(**inputs, num_items_in_batch=share).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, model


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that replays a step, after `SETTLING` steps: what they allocate must not be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(SETTLING):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def time_alone(config: Config, graph: bool, steps: int) -> dict[str, Any]:
    """Time the step without DeepSpeed, each launched or as a graph."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, _ = step_alone(config, device)
    if graph and device.type == "cuda":
        step = captured(step)
    times = []
    for _ in range(steps // EVERY):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(EVERY):
            step()
        _synchronize(device)
        times.append((time.perf_counter() - start) / EVERY)
    seconds = statistics.median(times[2:])
    tokens = config.global_batch_size * config.data.seq_len
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    flops = train_flops_per_token(load_model_of(config)) * tokens / seconds
    gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    _free()
    speed = {"step_seconds": seconds, "tokens_per_second_per_gpu": tokens / seconds, "gb": gb}
    return speed | {"mfu": flops / peak if peak else 0.0}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def show(size: str, form: str, found: list[dict[str, Any]]) -> None:
    """Print a row: speed of one run and of all, step, MFU of all, memory of one, and what the loop adds to a step."""
    speeds = [x["tokens_per_second_per_gpu"] / 1e3 for x in found]
    loop = f"{1e3 * found[0]['loop_seconds']:.1f}" if "loop_seconds" in found[0] else ""
    loss = f"{found[0]['loss']:.4f}" if "loss" in found[0] else ""
    print(
        f"{size:8} {form:12} {statistics.mean(speeds):9.1f} {sum(speeds):9.1f} {1e3 * found[0]['step_seconds']:9.1f} "
        f"{sum(x['mfu'] for x in found):6.3f} {found[0]['gb']:6.1f} {loop:>9} {loss:>8}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", help="YAML file of a ladder")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("work", type=Path, help="folder of the runs; must be new")
    parser.add_argument("--sizes", nargs="+", help="sizes of the ladder (default all)")
    parser.add_argument("--arm", default="gated_deltanet", help="arm of the ladder (default gated_deltanet)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--steps", type=int, default=60, help="steps per run (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    ladder, cells = load_ladder(args.ladder)
    sizes = args.sizes or list(ladder.sizes)
    first = {cell.size: cell for cell in reversed(cells) if cell.arm == args.arm and cell.range != "positive"}
    on_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{card}, torch {torch.__version__}; thousand tokens per second")
    print(
        f"{'size':8} {'form':12} {'of a run':>9} {'of all':>9} {'ms/step':>9} {'MFU':>6} {'GB':>6} {'ms beside':>9} "
        f"{'loss':>8}"
    )
    figures = []
    for form in args.forms:
        several, _, layers = form.rpartition(" ")
        changes = {"precision": "bfloat16", "fused_layers": layers == "fused"} if on_gpu else {"precision": "float32"}
        number = 2 if several else 1
        folders = {size: [args.work / f"{size}-{form.replace(' ', '-')}-{i}" for i in range(number)] for size in sizes}
        if form not in ("launched", "graph"):
            train_together([
                [config_of(first[s].config, args.corpus, folders[s][i], args.steps, changes) for s in sizes]
                for i in range(number)
            ])  # fmt: skip
        for size in sizes:
            if form in ("launched", "graph"):
                raw = config_of(
                    first[size].config, args.corpus, args.work, args.steps, changes | {"fused_layers": None}
                )
                found = [time_alone(parse_config(raw, "ladder_speed"), form == "graph", args.steps)]
            else:
                found = [read_run(folder) for folder in folders[size]]
            show(size, form, found)
            figures.append({"size": size, "form": form, "runs": found})
            if args.json is not None:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
