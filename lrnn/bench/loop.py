"""Measure the time of a training step outside of forward, backward and update."""

import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lrnn.errors import UserError
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.data.micro_batch import model_inputs
from lrnn.pretrain.data.training_data import open_data
from lrnn.pretrain.distributed import Ranks, init_ranks
from lrnn.pretrain.engine import build_engine, build_model
from lrnn.pretrain.fused.layers import refresh
from lrnn.pretrain.launch import StopRequest
from lrnn.pretrain.stages import stages_of
from lrnn.pretrain.step import one_reduction, warm_up
from lrnn.pretrain.train import train
from lrnn.records import read_metrics

SETTLING = 5  # first steps, which are not counted


def bare_steps(config: Config, ranks: Ranks, steps: int) -> list[float]:
    """Return the seconds of each step of forward, backward and update alone, on micro-batches already on the device."""
    model_config = load_model_of(config)
    data = open_data(config, model_config, ranks)
    model = build_model(model_config, config.seed, config.activation_checkpointing == "full")
    engine = build_engine(model.to(ranks.device), config, ranks)
    with data.loader(0, None, pin_memory=ranks.device.type == "cuda") as loader:
        batches = next(loader)
    inputs = [model_inputs(batch, ranks.device) for batch in batches]
    share = torch.tensor(sum(batch.num_labels for batch in batches), device=ranks.device)
    for batch in data.throwaway_batches(0):
        warm_up(engine, batch)
    seconds = []
    for _ in range(steps):
        start = _now(ranks)
        refresh(engine.module)
        with one_reduction(engine, len(inputs)):
            for i, arguments in enumerate(inputs):
                engine.set_gradient_accumulation_boundary(i == len(inputs) - 1)
                engine.backward(engine(**arguments, num_items_in_batch=share).loss, scale_wrt_gas=False)
        engine.set_gradient_accumulation_boundary(True)
        engine.step()
        seconds.append(_now(ranks) - start)
    engine.destroy()
    return seconds[SETTLING:]


def whole_steps(config: Config, ranks: Ranks) -> tuple[list[float], list[float]]:
    """Return the seconds per step of the real loop, and those outside of forward, backward and update, per record."""
    train(config, ranks, StopRequest())
    records = [r for r in read_metrics(Path(config.run_dir)) if "event" not in r and r["step"] > SETTLING]
    return [r["step_seconds"] for r in records], [r["loop_seconds"] for r in records]


def bench_loop(path: str, overrides: list[str], steps: int) -> None:
    """Print the table of `lrnn bench loop`, with bare and whole steps in turn. Raises UserError for too few steps."""
    if steps <= SETTLING:
        raise UserError(f"--steps {steps} should be at least {SETTLING + 1}: the first {SETTLING} are not counted")
    ranks = init_ranks()
    rows: list[tuple[str, list[float]]] = []
    shares = []
    with tempfile.TemporaryDirectory(prefix="lrnn-bench-") as root:
        for turn in range(2):
            fixed = ["checkpoint.every=1000000", "log.heldout_every=0", f"run_dir={root}/{turn}"]
            fixed += ["eval={}", "samples={}", "schedule.warmup_steps=0", "schedule.decay_steps=0"]
            first = stages_of(load_config(path, [*overrides, *fixed]))[0]
            config = first.config.model_copy(update={"steps": steps})
            rows.append(("bare steps", bare_steps(config, ranks, steps)))
            _free()
            whole, outside = whole_steps(config, ranks)
            rows += [("the loop's steps", whole), ("  outside of the step", outside)]
            shares.append(sum(outside) / sum(whole))
            _free()
    dist.destroy_process_group()
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    print(f"{path}: {device}, torch {torch.__version__}, {steps} steps, the first {SETTLING} left out")
    print(f"{'milliseconds per step':28} {'min':>9} {'median':>9} {'max':>9}")
    for name, seconds in rows:
        figures = (min(seconds), statistics.median(seconds), max(seconds))
        print(f"{name:28} " + " ".join(f"{1e3 * x:9.2f}" for x in figures))
    print("outside of forward, backward and update: " + ", ".join(f"{100 * s:.2f}%" for s in shares) + " of a step")


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
