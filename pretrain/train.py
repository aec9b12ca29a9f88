"""Pretrain a model, or go on with a run where its newest checkpoint stands.

Started by hand it runs one process for each visible GPU (one on a machine without); under torchrun or srun it joins the
others. SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with status 75.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain import checkpoint, zero_state
from lrnn.pretrain.config import Config, dump_config, load_config
from lrnn.pretrain.data import Data, HeldOut, make_loader, open_data
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
from lrnn.pretrain.loader import MicroBatch
from lrnn.pretrain.metrics import EigenvalueProbe, MetricsLog, Speed
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


def train(config: Config, ranks: Ranks, stop: StopRequest) -> int:
    """The training loop. Returns 0 when the last step is done, `STOPPED` after the step in which `stop` came."""
    run = open_run(config, ranks)
    progress, data = run.progress, run.data
    engine, probe = start_engine(run, config, ranks)
    log = MetricsLog(config, progress.step, progress.step > 0, ranks) if ranks.is_main else None
    if log is not None:
        log.say(_describe(run, config, ranks, engine))
    speed = Speed(config, run.model_config, ranks)
    bad_steps, stopping = 0, False

    with make_loader(data, config, ranks, progress.samples, progress.stream) as loader:
        if progress.step < config.steps:
            warm_up(engine, data.throwaway_batch(), ranks)
        speed.skip()
        while progress.step < config.steps and not stopping:
            micro_batches = next(loader)
            logging = (progress.step + 1) % config.log.every == 0 or progress.step + 1 == config.steps
            lr = learning_rate(progress.step, config)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            probe.enabled = logging
            with speed.step():
                loss, n_tokens = train_step(engine, micro_batches, ranks, probe)

            progress.step += 1
            progress.samples += config.global_batch_size
            progress.tokens += n_tokens
            progress.stream = loader.stream_state
            bad_steps = 0 if engine.was_step_applied() else bad_steps + 1
            if bad_steps:  # DeepSpeed skips, on all ranks, an update with a gradient that is not finite
                progress.skipped_steps += 1
                report_skipped(log, ranks, progress.step, float(loss), micro_batches)
                if bad_steps >= config.max_skipped_steps:
                    raise RuntimeError(
                        f"loss or gradient not finite in {bad_steps} steps in a row, up to step {progress.step}; "
                        f"the samples stand in {config.run_dir}/metrics.jsonl under event skipped_step"
                    )

            record: dict[str, Any] = {}
            if logging:
                record = {"step": progress.step, "loss": float(loss), "lr": lr}
                record |= {"grad_norm": float(engine.get_global_grad_norm()), "tokens": progress.tokens}
                record |= {"samples": progress.samples, "skipped_steps": progress.skipped_steps}
                record |= speed.read(loader.take_wait_s())
                record["eigenvalues"] = probe.read()
            if run.heldout.due(progress.step):
                record |= {"step": progress.step, "heldout_loss": run.heldout.loss(engine)}
                speed.skip()
            if log is not None and record:
                log.write(record)
            # A signal in the last step stops nothing: the run is done.
            stopping = ranks.any(stop.signal is not None) and progress.step < config.steps
            if stopping or progress.step % config.checkpoint.every == 0 or progress.step == config.steps:
                folder = save(config, engine, ranks, run)
                if log is not None:
                    log.write({"event": "checkpoint", "step": progress.step, "path": str(folder)})
                speed.skip()

    if log is not None:
        log.say("stopped by a signal: run the same command to go on" if stopping else "done")
        log.close()
    return STOPPED if stopping else 0


@dataclass
class Run:
    """What a run needs before there is an engine; all of it is checked."""

    model_config: LrnnConfig
    data: Data
    heldout: HeldOut
    saved: Path | None  # the checkpoint to go on from
    progress: Progress


def open_run(config: Config, ranks: Ranks) -> Run:
    """Find and check model, data and checkpoint. Raises UserError on all ranks for whatever is wrong with them."""
    run_dir = Path(config.run_dir)

    def open_parts() -> Run:
        model_config = load_model_config(config.model)
        deepspeed_config(config, ranks.world_size)
        data = open_data(config, model_config, ranks)
        saved = checkpoint.find_newest(run_dir) if ranks.is_main else None  # it reads all checksums
        return Run(model_config, data, HeldOut(data, config, ranks), saved, Progress())

    run = ranks.together(open_parts)
    run.saved = ranks.gather(run.saved)[0]
    if run.saved is not None:
        check_same_run(run.saved, run.model_config, run.data.description)
        run.progress = Progress(**checkpoint.read_progress(run.saved)["progress"])

    def write_config() -> None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(run_dir / "run.yaml", dump_config(config))
        except OSError as error:
            raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}: {error.filename})") from None

    ranks.together(write_config if ranks.is_main else lambda: None)
    return run


def start_engine(run: Run, config: Config, ranks: Ranks) -> tuple[Any, EigenvalueProbe]:
    """The model, with the checkpoint's weights and moments where there is one, in a DeepSpeed engine."""
    model = build_model(run.model_config, config.seed, config.activation_checkpointing)
    state = checkpoint.SavedState(run.saved) if run.saved is not None else None
    if state is not None:
        state.load_into(model)
    probe = EigenvalueProbe(model)
    engine = build_engine(model.to(ranks.device), config, ranks)
    if state is not None:
        zero_state.restore(engine, state.read, run.progress.optimizer_step)
    return engine, probe


def train_step(
    engine: Any, micro_batches: list[MicroBatch], ranks: Ranks, probe: EigenvalueProbe
) -> tuple[Tensor, int]:
    """Forward, backward and update. The loss is the mean over all labels of the step, however they are spread.

    Returns the loss, a tensor on the device, and the number of labels of the whole step.
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
    return loss, int(n_tokens)  # on a GPU this waits for the step to end


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch as arguments of the model, on its device."""
    tensors = {"input_ids": batch.input_ids, "shift_labels": batch.labels}
    if batch.cu_seqlens is not None:
        tensors["cu_seqlens"] = batch.cu_seqlens
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def warm_up(engine: Any, batch: MicroBatch, ranks: Ranks) -> None:
    """A forward and backward pass of full shape, all gradients zero: what is too large fails before step 1."""
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(**model_inputs(batch, ranks.device)).loss * 0.0, scale_wrt_gas=False)
    engine.optimizer.zero_grad()
    ranks.barrier()


def save(config: Config, engine: Any, ranks: Ranks, run: Run) -> Path:
    """Write a checkpoint and drop the ones that need not be kept. Returns its folder."""
    run.progress.optimizer_step = zero_state.optimizer_step(engine)
    contents = {"step": run.progress.step, "progress": asdict(run.progress), "data": run.data.description}
    texts = {"config.json": run.model_config.to_json_string(use_diff=False), "run.yaml": dump_config(config)}
    folder = checkpoint.save(Path(config.run_dir), engine, ranks, contents, texts, run.data.save_tokenizer)
    if ranks.is_main:
        checkpoint.retain(folder, config.checkpoint.keep_last, config.checkpoint.keep_every)
    return folder


def check_same_run(saved: Path, model_config: LrnnConfig, description: dict[str, Any]) -> None:
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
                f"{saved} was trained on data with {key} = {data_before.get(key)!r}, now it is "
                f"{description.get(key)!r}; the position in the data would mean something else: restore it, or choose "
                "another run_dir"
            )


def report_skipped(
    log: MetricsLog | None, ranks: Ranks, step: int, loss: float, micro_batches: list[MicroBatch]
) -> None:
    """Record which samples the skipped step was made of; to be called on all ranks."""
    samples = sorted(chain.from_iterable(ranks.gather([i for b in micro_batches for i in b.sample_indices.tolist()])))
    if log is not None:
        log.write({"event": "skipped_step", "step": step, "loss": str(loss), "samples": samples})
        log.say(f"step {step} skipped: loss {loss} or its gradient is not finite; samples {samples[:8]}...")


def _describe(run: Run, config: Config, ranks: Ranks, engine: Any) -> str:
    start = f"resuming {run.saved}" if run.saved is not None else f"new run {config.run_dir}"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    # Under ZeRO-3 a parameter's own numel is that of its part.
    n = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = config.global_batch_size * config.data.seq_len
    shape = f"{ranks.world_size} x {device}, {tokens:,} tokens a step, {config.steps} steps"
    return f"{start}: {n / 1e6:.1f}M parameters, {shape}"


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
        load_model_config(config.model)  # the cheap checks come before processes start
        deepspeed_config(config, processes)
        if processes > 1:
            return launch(processes, [sys.executable, "-m", "lrnn.cli", "pretrain", args.config, *args.overrides])
    with StopRequest() as stop:  # before all that takes long: a signal during that must not end the run for good
        ranks = init_ranks()
        try:
            return train(config, ranks, stop)
        except UserError:
            if ranks.is_main:
                raise
            return 2  # the main process says it
        finally:
            dist.destroy_process_group()
