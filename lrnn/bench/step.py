"""Measure a training step of a run on GPUs: time by kinds of computation, gaps, MFU and memory, beside fla's model."""

import argparse
import gc
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.bench import fla_model
from lrnn.bench.kernels import environment
from lrnn.bench.kinds import kernel_times
from lrnn.bench.step_table import Measured, Workload, kernel_lines, table
from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.data.micro_batch import MicroBatch, build_micro_batch
from lrnn.pretrain.distributed import Ranks, init_ranks
from lrnn.pretrain.engine import build_engine, build_model
from lrnn.pretrain.metrics.flops import peak_flops, train_flops_per_token
from lrnn.pretrain.metrics.speed import peak_memory
from lrnn.pretrain.stages import stages_of
from lrnn.pretrain.step import train_step, warm_up

MICRO_BATCHES = 4  # per step and GPU at most, because more of them only repeat what these do
DOCUMENT = 500  # tokens of a document on average
SETTLING, TIMED, PROFILED = 2, 5, 2  # steps


def bench_step(args: argparse.Namespace) -> None:
    """Print the table of `lrnn bench step`."""
    config = stages_of(load_config(args.run, args.overrides))[0].config
    model_config = load_model_of(config)
    if not torch.cuda.is_available():
        raise UserError("lrnn bench step needs a CUDA GPU, and PyTorch finds none here")
    ranks = init_ranks()
    try:
        measure_and_print(config, model_config, ranks, args)
    finally:
        dist.destroy_process_group()


def measure_and_print(config: Config, model_config: LrnnConfig, ranks: Ranks, args: argparse.Namespace) -> None:
    """Measure our step and fla's, and print the table on the main rank."""
    configured = config.batching(ranks.rank, ranks.world_size).accumulation_steps
    config = cut_to(config, min(configured, MICRO_BATCHES), ranks.world_size)
    batches = random_batches(config, model_config.vocab_size, ranks)
    work = Workload(
        tokens=len(batches) * config.micro_batch_size * config.data.seq_len,
        flops_per_token=train_flops_per_token(model_config),
        peak_flops=peak_flops(torch.cuda.get_device_name(ranks.device)),
    )
    env = environment()
    say = print if ranks.is_main else _nothing
    say("\n".join(f"{name:22}{value}" for name, value in env.items()))
    say("\n".join(_describe(config, model_config, ranks, configured)))
    columns = [measure_ours(config, model_config, batches, ranks)]
    say(f"lrnn: {columns[0].milliseconds:.1f} ms per step")  # fla takes minutes, and may end the process
    reason = "--only-ours" if args.only_ours else fla_model.reason_without(model_config, ranks.world_size)
    if reason is None:
        columns += [measure_fla(config, model_config, batches, ranks, dtype) for dtype in fla_model.DTYPES]
    notes = fla_model.notes(config) if reason is None else [f"left out: {reason}"]
    say("\n".join(f"fla: {note}" for note in notes))
    say("\n" + "\n".join(table(columns, work)))
    if args.verbose:
        for column in columns:
            say("\n" + "\n".join(kernel_lines(column)))
    if args.json and ranks.is_main:
        figures = [column.figures(work) for column in columns]
        write_json(args.json, {"environment": env, "tokens_per_step": work.tokens, "models": figures})


def cut_to(config: Config, micro_batches: int, world_size: int) -> Config:
    """Return the configuration with so many micro-batches per step and process."""
    samples = micro_batches * config.micro_batch_size * world_size
    return config.model_copy(update={"global_batch_size": samples})


def random_batches(config: Config, vocab_size: int, ranks: Ranks) -> list[MicroBatch]:
    """Return this rank's micro-batches of a step, of random tokens in documents of `DOCUMENT` tokens on average."""
    seq_len = config.data.seq_len
    samples = config.batching(ranks.rank, ranks.world_size).own_samples(0)[0]
    random = np.random.default_rng([config.seed, ranks.rank])
    batches = []
    for numbers in samples:
        rows = []
        for _ in numbers:
            starts = np.flatnonzero(random.random(seq_len + 1) < 1 / DOCUMENT)
            rows.append((random.integers(0, vocab_size, seq_len + 1), starts))
        batch = build_micro_batch(rows, seq_len, numbers, config.data.reset_at_document_boundaries)
        batches.append(batch.pin_memory() if ranks.device.type == "cuda" else batch)
    return batches


def measure_ours(config: Config, model_config: LrnnConfig, batches: list[MicroBatch], ranks: Ranks) -> Measured:
    """Measure the step of `lrnn pretrain`.

    Raises:
        UserError: it does not fit in the memory of the GPU.
    """
    try:
        with our_step(config, model_config, batches, ranks) as step:
            return measure("lrnn", step, ranks.device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} with data.seq_len={config.data.seq_len} does not fit in the "
            f"memory of {torch.cuda.get_device_name(ranks.device)}; lower micro_batch_size, or set "
            "activation_checkpointing=full"
        ) from error
    finally:
        _free()


@contextmanager
def our_step(
    config: Config, model_config: LrnnConfig, batches: list[MicroBatch], ranks: Ranks
) -> Iterator[Callable[[], None]]:
    """Build the model and engine of `lrnn pretrain`, and give a function that computes its step with learning rate 0.

    The weights stay as they are, so every step computes the same.
    """
    model = build_model(model_config, config.seed, config.activation_checkpointing == "full")
    engine = build_engine(model.to(ranks.device), config, ranks)
    warm_up(engine, batches[0])

    def step() -> None:
        train_step(engine, batches, lr=0.0, limit=math.inf)
        if not engine.was_step_applied():
            raise RuntimeError("the gradient of random tokens is not finite, so the optimizer was not measured")

    try:
        yield step
    finally:
        engine.destroy()


def measure_fla(
    config: Config, model_config: LrnnConfig, batches: list[MicroBatch], ranks: Ranks, dtype: torch.dtype
) -> Measured:
    """Measure fla's model with parameters in `dtype`. If it does not run, the error is in the result."""
    name = f"fla {str(dtype)[6:]}"
    kept = torch.cuda.memory_allocated() if ranks.device.type == "cuda" else 0  # DeepSpeed keeps an engine of ZeRO-3
    try:
        model = fla_model.build(model_config, dtype, ranks.device)
        found = measure(name, fla_model.training_step(model, config, batches, ranks.device), ranks.device)
        return replace(found, peak_bytes=found.peak_bytes - kept)
    except Exception as error:  # whatever it is, our own figures must not be lost
        text = str(error).strip().splitlines()
        return Measured(name, error=f"{type(error).__name__}: {text[0] if text else ''}")
    finally:
        with suppress(RuntimeError):  # after an error of CUDA, this fails too
            _free()


def measure(name: str, step: Callable[[], None], device: torch.device) -> Measured:
    """Time some steps, and profile others.

    Raises:
        UserError: the profiler sees no kernels.
    """
    for _ in range(SETTLING):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [_time(step, device) for _ in range(TIMED)]
    peak_bytes = peak_memory(device)
    kernels = kernel_times(profile(step, PROFILED))
    if not kernels:
        raise UserError(
            "torch.profiler recorded no kernels: it cannot use CUPTI, the profiling interface of CUDA, here"
        )
    per_step = Counter({kernel: milliseconds / PROFILED for kernel, milliseconds in kernels.items()})
    return Measured(name, seconds, per_step, peak_bytes)


def profile(step: Callable[[], None], count: int) -> list[dict[str, Any]]:
    """Return the events of a Chrome trace of some steps, with the GPU's part alone, so that the host is not slowed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="lrnn-bench-") as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def _describe(config: Config, model_config: LrnnConfig, ranks: Ranks, configured: int) -> list[str]:
    """Return what is measured, for people. A step of the run has `configured` micro-batches per process."""
    with torch.device("meta"):
        millions = sum(p.numel() for p in LrnnForCausalLM(model_config).parameters()) / 1e6
    micro_batches = config.batching(ranks.rank, ranks.world_size).accumulation_steps
    d = config.data
    more = f"; a step of the run has {configured}" if configured > micro_batches else ""
    documents = f" in documents of {DOCUMENT} tokens on average" if d.reset_at_document_boundaries else ""
    engine = config.deepspeed or f"ZeRO-{config.zero}, {config.precision}"
    return [
        f"{millions:,.1f}M parameters, mixer {model_config.mixer}, on {ranks.world_size} x "
        f"{torch.cuda.get_device_name(ranks.device)}",
        f"{ranks.world_size} x {micro_batches} micro-batches of {config.micro_batch_size} x {d.seq_len:,} random "
        f"tokens{documents} per step{more}",
        f"{engine}, activation_checkpointing: {config.activation_checkpointing}; {TIMED} steps timed, {PROFILED} "
        "others profiled",
    ]


def _time(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nothing(text: str) -> None:
    """Print nothing, on ranks other than the main one."""
