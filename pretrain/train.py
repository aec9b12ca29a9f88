"""Pretrain a model, or go on with a run where its newest checkpoint stands.

Started by hand it runs one process for each visible GPU (one on a machine without); under torchrun or srun it joins the
others. SIGTERM, SIGUSR1 and Ctrl-C finish the step, write a checkpoint and exit with status 75.
"""

import argparse
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrnn.errors import UserError
from lrnn.model_config import load_model_config
from lrnn.pretrain.checkpoint.writer import CheckpointWriter, Outcome
from lrnn.pretrain.config import Config, load_config
from lrnn.pretrain.data.loader import Loader, MicroBatch, model_inputs
from lrnn.pretrain.data.sources import make_loader
from lrnn.pretrain.data.stream import StreamLoader
from lrnn.pretrain.distributed import (
    STOPPED,
    Ranks,
    StopRequest,
    check_world,
    default_processes,
    end_with_launcher,
    init_ranks,
    is_worker,
    launch,
)
from lrnn.pretrain.engine import deepspeed_config
from lrnn.pretrain.guard import BadSteps, Verdict
from lrnn.pretrain.metrics.log import EigenvalueProbe, MetricsLog, Speed
from lrnn.pretrain.run import Run, contents_of_checkpoint, open_run, roll_back, start_engine
from lrnn.pretrain.schedule import learning_rate
from lrnn.pretrain.watchdog.watchdog import Watchdog


def train(config: Config, ranks: Ranks, stop: StopRequest) -> int:
    """The training loop. Returns 0 when the last step is done, `STOPPED` when it ended early because `stop` came.

    Raises UserError on all ranks for what is wrong with the run, its data or its storage; what was trained until then
    is in a checkpoint, unless the storage is what is wrong.
    """
    with ExitStack() as exits:
        watchdog = exits.enter_context(Watchdog(ranks, config.watchdog))
        watchdog.enter("checking data and checkpoints", 0)
        run = open_run(config, ranks, exits)
        progress, data, first = run.progress, run.data, run.progress.step
        watchdog.enter("starting the engine" if run.saved is None else "loading the checkpoint", 0)
        engine, probe = start_engine(run, config, ranks)
        log = None
        if ranks.is_main:
            log = exits.enter_context(closing(MetricsLog(config, first, run.saved is not None, ranks)))
            log.say(_describe(run, config, ranks, engine))
            watchdog.log = log
        speed = Speed(config, run.model_config, ranks)
        bad_steps = BadSteps(config, ranks, progress.losses, log)
        writer = exits.enter_context(
            CheckpointWriter(
                Path(config.run_dir), ranks, config.checkpoint, data.save_tokenizer,
                lambda outcome: report_checkpoint(log, progress.step, outcome),
            )
        )  # fmt: skip
        loader = make_loader(data, config, ranks, progress.samples, progress.stream)
        exits.enter_context(loader)
        if first < config.steps:
            watchdog.enter("trying a first pass", 0)
            warm_up(engine, data.throwaway_batch(), ranks)
        speed.skip()
        stopping, data_error = False, None

        while progress.step < config.steps:
            watchdog.enter("waiting for data", progress.step + 1)
            micro_batches, data_error = next_step(loader)
            watchdog.enter("agreeing whether to go on", progress.step + 1)
            # One agreement a step: does any rank want to stop, lack data, still write?
            stopped, broken, writing = ranks.worst(stop.signal is not None, data_error is not None, writer.vote)
            writer.advance(writing)
            if stopped or broken:
                stopping = bool(stopped)
                break

            logging = (progress.step + 1) % config.log.every == 0 or progress.step + 1 == config.steps
            lr = learning_rate(progress.step, config)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            probe.enabled = logging
            watchdog.enter("computing the step", progress.step + 1)
            with speed.step():
                done = train_step(engine, micro_batches, ranks, probe, bad_steps.limit)

            progress.step += 1
            progress.samples += config.global_batch_size
            progress.tokens += done.n_tokens
            progress.stream = loader.stream_state
            loss = float(done.loss)
            verdict = bad_steps.judge(
                progress.step, engine.was_step_applied(), loss, done.micro_batch_losses, micro_batches
            )
            progress.losses = bad_steps.history
            if verdict is not Verdict.GOOD:
                progress.skipped_steps += 1
            if verdict is Verdict.ROLL_BACK:
                watchdog.enter("going back to a checkpoint", progress.step)
                writer.wait()
                spike_at = progress.step
                saved = roll_back(run, engine, config, ranks)
                bad_steps.rolled_back(spike_at, saved)
                bad_steps.look_back_on(progress.losses)
                if saved is not None:
                    speed.skip()
                    continue

            record: dict[str, Any] = {}
            if logging:
                record = {"step": progress.step, "loss": loss, "lr": lr}
                record |= {"grad_norm": float(engine.get_global_grad_norm()), "tokens": progress.tokens}
                record |= {"samples": progress.samples, "skipped_steps": progress.skipped_steps}
                record |= speed.read(loader.take_wait_s())
                record["eigenvalues"] = probe.read()
            if run.heldout.due(progress.step):
                watchdog.enter("measuring the held-out loss", progress.step)
                record |= {"step": progress.step, "heldout_loss": run.heldout.loss(engine)}
                speed.skip()
            watchdog.enter("writing metrics", progress.step)
            if log is not None and record:
                log.write(record)
            if writer.due(progress.step):
                watchdog.enter("saving a checkpoint", progress.step)
                writer.begin(engine, *contents_of_checkpoint(run, config, engine))
                speed.skip()

        watchdog.enter("saving a checkpoint", progress.step)
        writer.wait()
        if progress.step not in (first, writer.saved_step):
            writer.begin(engine, *contents_of_checkpoint(run, config, engine))
            writer.wait()
            if writer.saved_step != progress.step:
                raise UserError(
                    f"the checkpoint of step {progress.step} could not be written: {writer.error}; mend the storage "
                    "and run the same command: the run goes on from its newest checkpoint"
                )
        reasons = [reason for reason in ranks.gather(data_error) if reason is not None]
        if reasons:
            raise UserError(f"{reasons[0]} (the run stands at step {progress.step}, and its checkpoint is written)")
        watchdog.enter("closing the logs", progress.step)
        if log is not None:
            log.say("stopped by a signal: run the same command to go on" if stopping else "done")
        return STOPPED if stopping else 0


def next_step(loader: Loader | StreamLoader) -> tuple[list[MicroBatch], str | None]:
    """The micro-batches of the next step, or why there are none: a shard that is corrupt, a source that went away."""
    try:
        return next(loader), None
    except (UserError, OSError) as error:
        return [], str(error)


@dataclass
class Step:
    """What a training step was."""

    loss: Tensor  # mean over all labels of the step, on all ranks; a scalar on the device
    micro_batch_losses: Tensor  # [micro-batches of this rank], means over their own labels
    n_tokens: int  # labels of the step, on all ranks


def train_step(
    engine: Any, micro_batches: list[MicroBatch], ranks: Ranks, probe: EigenvalueProbe, limit: float
) -> Step:
    """Forward, backward and update. The loss is the mean over all labels of the step, however they are spread.

    The update is refused, on all ranks, where the loss is not finite or above `limit`, or a gradient is not finite;
    `engine.was_step_applied()` tells.
    """
    labels = torch.tensor([int((b.labels != -100).sum()) for b in micro_batches], device=ranks.device)
    n_tokens = labels.sum()
    dist.all_reduce(n_tokens)
    # DeepSpeed averages gradients over ranks, so a rank's share is its sum of losses x ranks / tokens.
    share = n_tokens.clamp(min=1) / ranks.world_size
    loss, parts = torch.zeros((), device=ranks.device), []
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        engine.set_gradient_accumulation_boundary(last)
        part = engine(**model_inputs(batch, ranks.device), num_items_in_batch=share).loss
        probe.enabled = False  # the first micro-batch is sample enough
        parts.append(part.detach())
        if last:
            loss = torch.stack(parts).sum() / ranks.world_size
            dist.all_reduce(loss)
            # The loss is judged before the last backward pass, on the device, so that nothing waits. A factor of NaN
            # makes every gradient NaN, and DeepSpeed skips, on all ranks, an update with one that is not finite.
            part = part * torch.where(loss.isfinite() & (loss <= limit), 1.0, torch.nan)
        engine.backward(part, scale_wrt_gas=False)
    engine.step()
    micro_batch_losses = torch.stack(parts) * share / labels.clamp(min=1)
    return Step(loss, micro_batch_losses, int(n_tokens))  # on a GPU this waits for the step to end


def warm_up(engine: Any, batch: MicroBatch, ranks: Ranks) -> None:
    """A forward and backward pass of full shape, all gradients zero: what is too large fails before step 1."""
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(**model_inputs(batch, ranks.device)).loss * 0.0, scale_wrt_gas=False)
    engine.optimizer.zero_grad()
    ranks.barrier()


def report_checkpoint(log: MetricsLog | None, step: int, outcome: Outcome) -> None:
    """Record what became of a checkpoint, in the main process; `step`: where training stands by now."""
    if log is None:
        return
    record = {"step": outcome.step, "path": str(outcome.folder), "done_at_step": step}
    record |= {"stall_seconds": round(outcome.stall_s, 4), "write_seconds": round(outcome.write_s, 4)}
    if outcome.error is None:
        log.write({"event": "checkpoint", **record})
    else:
        log.write({"event": "checkpoint_failed", "error": outcome.error, **record})
        log.say(f"checkpoint of step {outcome.step} could not be written, training goes on: {outcome.error}")
    if outcome.warning is not None:
        log.say(f"{outcome.folder} is written, but: {outcome.warning}")


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
        end_with_launcher()
        ranks = init_ranks()
        try:
            return train(config, ranks, stop)
        except UserError:
            if ranks.is_main:
                raise
            return 2  # the main process says it
        finally:
            dist.destroy_process_group()
            try:
                sys.stdout.flush()
            except OSError:  # the disk of the log is full; Python would exit with 120, where batch scripts go by 75
                sys.stdout = None
