"""Pretrain a model, or go on with a run where its newest checkpoint stands.

Started by hand it runs one process for each visible GPU (one on a machine without); under torchrun or srun it joins the
others. SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with status 75.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.errors import UserError
from lrnn.pretrain import checkpoint, zero_state
from lrnn.pretrain.config import Config, dump_config, load_config
from lrnn.pretrain.data import HeldOut, make_loader, open_data
from lrnn.pretrain.distributed import (
    STOPPED,
    Ranks,
    StopRequest,
    check_world,
    default_processes,
    init_ranks,
    is_worker,
    launch,
)
from lrnn.pretrain.engine import build_engine, build_model, deepspeed_config, load_model_config
from lrnn.pretrain.flops import peak_flops, train_flops_per_token
from lrnn.pretrain.loader import MicroBatch
from lrnn.pretrain.metrics import EigenvalueProbe, MetricsLog
from lrnn.pretrain.schedule import learning_rate


@dataclass
class Progress:
    """How far a run is; stored in every checkpoint."""

    step: int = 0  # steps done, skipped ones included
    samples: int = 0  # samples consumed: the position in the data
    tokens: int = 0  # labels that the loss was taken over
    skipped_steps: int = 0
    optimizer_step: int = 0  # updates applied
    stream: dict[str, Any] | None = None  # position in a streamed source


def train(config: Config, ranks: Ranks) -> int:
    """The training loop. Returns 0 when the last step is done, `STOPPED` after a stop signal."""
    run_dir = Path(config.run_dir)
    model_config = load_model_config(config.model)
    deepspeed_config(config, ranks.world_size)  # its errors come before any work
    data = open_data(config, model_config, ranks)
    saved = ranks.gather(checkpoint.find_newest(run_dir) if ranks.is_main else None)[0]
    progress = Progress()
    if saved is not None:
        check_same_run(saved, model_config, data.description)
        progress = Progress(**checkpoint.read_progress(saved)["progress"])

    model = build_model(model_config, config.seed, config.activation_checkpointing)
    state = checkpoint.SavedState(saved) if saved is not None else None
    if state is not None:
        state.load_into(model)
    probe = EigenvalueProbe(model)
    engine = build_engine(model.to(ranks.device), config, ranks)
    if state is not None:
        zero_state.restore(engine, state.read, progress.optimizer_step)
    heldout = HeldOut(data, config, ranks)

    log = None
    if ranks.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(run_dir / "run.yaml", dump_config(config))
        log = MetricsLog(run_dir, config.log, config.steps, progress.step)
        log.write(
            {"event": "start", "step": progress.step, "processes": ranks.world_size, "resumed": saved is not None}
        )
        log.say(
            f"{'resuming ' + str(saved) if saved else 'new run ' + str(run_dir)}: {_describe(model, config, ranks)}"
        )

    peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    flops = train_flops_per_token(model_config)
    bad_steps = 0
    stopping = False
    clock = time.perf_counter()
    with StopRequest() as stop, make_loader(data, config, ranks, progress.samples, progress.stream) as loader:
        if progress.step < config.steps:
            warm_up(engine, data.throwaway_batch(), ranks)
        for micro_batches in loader if progress.step < config.steps else ():
            logging = (progress.step + 1) % config.log.every == 0 or progress.step + 1 == config.steps
            probe.enabled = logging
            lr = learning_rate(progress.step, config)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            loss, n_tokens = train_step(engine, micro_batches, ranks, probe)

            applied = engine.was_step_applied()
            progress.step += 1
            progress.samples += config.global_batch_size
            progress.tokens += int(n_tokens)
            progress.stream = loader.stream_state
            if applied:
                bad_steps = 0
            else:  # DeepSpeed skips, on all ranks, an update with a gradient that is not finite
                bad_steps += 1
                progress.skipped_steps += 1
                _report_skipped(log, ranks, progress.step, float(loss), micro_batches)
                if bad_steps >= config.max_skipped_steps:
                    raise RuntimeError(
                        f"loss or gradient not finite in {bad_steps} steps in a row, up to step {progress.step}; "
                        f"the samples stand in {run_dir}/metrics.jsonl under event skipped_step"
                    )

            record: dict[str, Any] = {}
            if logging:
                now = time.perf_counter()
                step_s, clock = (now - clock) / _steps_since_log(progress.step, config), now
                wait_s = loader.take_wait_s() / _steps_since_log(progress.step, config)
                tokens_per_s = config.global_batch_size * config.data.seq_len / step_s / ranks.world_size
                record = {
                    "step": progress.step,
                    "loss": float(loss),
                    "lr": lr,
                    "grad_norm": float(engine.get_global_grad_norm()),
                    "tokens": progress.tokens,
                    "samples": progress.samples,
                    "step_seconds": round(step_s, 5),
                    "tokens_per_second_per_gpu": round(tokens_per_s, 1),
                    "mfu": round(tokens_per_s * flops / peak, 4) if peak else None,
                    "data_wait_seconds": round(wait_s, 5),
                    "memory_gb": round(_peak_memory(ranks.device) / 1e9, 3),
                    "skipped_steps": progress.skipped_steps,
                    "eigenvalues": probe.read(),
                }
            if heldout.due(progress.step):
                record |= {"step": progress.step, "heldout_loss": heldout.loss(engine)}
                clock = time.perf_counter() if logging else clock
            if log is not None and record:
                log.write(record)
                if logging:
                    log.show(record)

            stopping = ranks.any(stop.signal is not None)
            if stopping or progress.step % config.checkpoint.every == 0 or progress.step == config.steps:
                folder = save(config, engine, ranks, progress, model_config, data)
                if log is not None:
                    log.write({"event": "checkpoint", "step": progress.step, "path": str(folder)})
                clock = time.perf_counter()
            if stopping or progress.step == config.steps:
                break

    if log is not None:
        log.say("stopped by a signal: run the same command to go on" if stopping else "done")
        log.close()
    return STOPPED if stopping else 0


def train_step(
    engine: Any, micro_batches: list[MicroBatch], ranks: Ranks, probe: EigenvalueProbe
) -> tuple[Tensor, Tensor]:
    """Forward, backward and update. The loss is the mean over all labels of the step, however they are spread.

    Returns the loss and the number of labels of the whole step, as tensors on the device.
    """
    n_tokens = torch.tensor(sum(int((b.labels != -100).sum()) for b in micro_batches), device=ranks.device)
    dist.all_reduce(n_tokens)
    # DeepSpeed averages gradients over ranks, so a rank's share is its sum of losses x ranks / tokens.
    share = n_tokens.clamp(min=1) / ranks.world_size
    loss = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        part = engine(**model_inputs(batch, ranks.device), num_items_in_batch=share).loss
        probe.enabled = False  # the first micro-batch is sample enough
        engine.backward(part, scale_wrt_gas=False)
        loss += part.detach() / ranks.world_size
    engine.step()
    dist.all_reduce(loss)
    return loss, n_tokens


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch as arguments of the model, on its device."""
    tensors = {"input_ids": batch.input_ids, "shift_labels": batch.labels}
    if batch.cu_seqlens is not None:
        tensors["cu_seqlens"] = batch.cu_seqlens
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def warm_up(engine: Any, batch: MicroBatch, ranks: Ranks) -> None:
    """A forward and backward pass of full shape with all gradients zero: what is too large fails before step 1."""
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(**model_inputs(batch, ranks.device)).loss * 0.0, scale_wrt_gas=False)
    engine.optimizer.zero_grad()
    ranks.barrier()


def save(config: Config, engine: Any, ranks: Ranks, progress: Progress, model_config: Any, data: Any) -> Path:
    """Write a checkpoint and drop the ones that need not be kept. Returns its folder."""
    progress.optimizer_step = zero_state.optimizer_step(engine)
    contents = {"step": progress.step, "progress": asdict(progress), "data": data.description}
    texts = {"config.json": model_config.to_json_string(use_diff=False), "run.yaml": dump_config(config)}
    folder = checkpoint.save(Path(config.run_dir), engine, ranks, contents, texts, data.save_tokenizer)
    if ranks.is_main:
        checkpoint.retain(Path(config.run_dir), config.checkpoint.keep_last, config.checkpoint.keep_every)
    return folder


def check_same_run(saved: Path, model_config: Any, description: dict[str, Any]) -> None:
    """Raises UserError where a checkpoint is of another model, or its position is one in other data."""
    before = json.loads((saved / "config.json").read_text())
    now = json.loads(model_config.to_json_string(use_diff=False))
    ignored = {"transformers_version", "dtype"}
    for key in sorted((set(before) | set(now)) - ignored):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{saved} was trained with {key} = {before.get(key)!r}, the model configuration says {now.get(key)!r}; "
                "a run resumes with the model it began with: restore the configuration, or choose another run_dir"
            )
    data_before = checkpoint.read_progress(saved)["data"]
    for key in sorted(set(data_before) | set(description)):
        if data_before.get(key) != description.get(key):
            raise UserError(
                f"{saved} was trained on data with {key} = {data_before.get(key)!r}, now it is {description.get(key)!r}; "
                "the position in the data would mean something else: restore it, or choose another run_dir"
            )


def _steps_since_log(step: int, config: Config) -> int:
    return (step - 1) % config.log.every + 1


def _report_skipped(log: MetricsLog | None, ranks: Ranks, step: int, loss: float, batches: list[MicroBatch]) -> None:
    samples = sorted(chain.from_iterable(ranks.gather([i for b in batches for i in b.sample_indices.tolist()])))
    if log is not None:
        log.write({"event": "skipped_step", "step": step, "loss": str(loss), "samples": samples})
        log.say(f"step {step} skipped: loss {loss} or its gradient is not finite; samples {samples[:8]}...")


def _peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe(model: torch.nn.Module, config: Config, ranks: Ranks) -> str:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    # Under ZeRO-3 a parameter's own numel is that of its part.
    n = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    tokens = config.global_batch_size * config.data.seq_len
    return f"{n / 1e6:.1f}M parameters, {ranks.world_size} x {device}, {tokens:,} tokens a step, {config.steps} steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--nproc", type=int, help="processes on this host; default one a visible GPU")
    parser.epilog = "example:\n  lrnn pretrain configs/340m.yaml run_dir=runs/340m optim.lr=2e-4"


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if not is_worker():
        processes = default_processes() if args.nproc is None else args.nproc
        check_world(processes)
        preflight(config, processes)
        if processes > 1:
            return launch(processes, [sys.executable, "-m", "lrnn.cli", "pretrain", args.config, *args.overrides])
    ranks = init_ranks()
    try:
        return train(config, ranks)
    except UserError as error:
        if ranks.is_main:
            raise
        print(f"rank {ranks.rank}: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def preflight(config: Config, processes: int) -> None:
    """What can be wrong with the input, found in one process before others start. Raises UserError."""
    model_config = load_model_config(config.model)
    deepspeed_config(config, processes)
    open_data(config, model_config, None, processes)
    if shutil.disk_usage(Path(config.run_dir).absolute().anchor).free == 0:
        raise UserError(f"no space left for run_dir {config.run_dir}")
