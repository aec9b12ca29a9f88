"""What a run says of itself: lines at its start, and records of events."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lrnn import LrnnConfig
from lrnn.pretrain.changes import Changes
from lrnn.pretrain.checkpoint.writer import Outcome
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.plan.start import lines_at_start
from lrnn.pretrain.progress import Progress
from lrnn.pretrain.stages import Stage, model_in, stages_of, steps_left


def describe(config: Config, ranks: Ranks, engine: Engine, saved: Path | None) -> str:
    """Return what is trained, on what, and for how long.

    Args:
        config: the configuration of the run.
        ranks: this process among all.
        engine: holds the model.
        saved: the checkpoint that the run resumes from, None for a new run.
    """
    start = f"resuming {saved}" if saved is not None else f"new run {config.run_dir}"
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    # Under ZeRO-3, a parameter's own numel counts only this rank's part.
    n = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    sizes = (stage.config.global_batch_size * stage.config.data.seq_len for stage in stages_of(config))
    tokens = " or ".join(dict.fromkeys(f"{size:,}" for size in sizes))
    shape = f"{ranks.world_size} x {device}, {tokens} tokens per step, {config.steps} steps"
    return f"{start}: {n / 1e6:.1f}M parameters, {shape}"


def estimates(
    stages: Sequence[Stage], config: Config, model: LrnnConfig, ranks: Ranks, progress: Progress
) -> Iterator[str]:
    """Yield what the rest of a run takes on its GPUs, stage by stage, as `lrnn plan` computes it. All ranks call this.

    Args:
        stages: those of the run.
        config: the configuration of the run.
        model: its model.
        ranks: the processes, each with a GPU.
        progress: how far the run is.
    """
    for stage, steps in steps_left(stages, progress.samples, progress.step):
        for line in lines_at_start(stage.config, model_in(stage, model), ranks, steps):
            yield f"{stage.name}: {line}" if config.stages else line


def announce(stage: Stage, step: int, log: MetricsLog) -> None:
    """Record and show that a run enters a stage after `step` steps."""
    record = {"event": "stage", "step": step, "stage": stage.number, "name": stage.name, "steps": stage.steps}
    log.write(record | {"seq_len": stage.config.data.seq_len})
    log.say(str(stage))


def report_changes(changes: Changes, step: int, log: MetricsLog) -> None:
    """Record and show the keys of the configuration that changed since the checkpoint of a step."""
    if changes:
        log.write({"event": "config_changed", "step": step, "changed": {k: list(v) for k, v in changes.items()}})
        for key, (before, now) in changes.items():
            log.say(f"changed since step {step}: {key} {before!r} -> {now!r}")


def report_checkpoint(outcome: Outcome, step: int, log: MetricsLog) -> None:
    """Record what became of a checkpoint, which may be of an earlier step than `step`, where the run is by now."""
    record = {"step": outcome.step, "path": str(outcome.folder), "done_at_step": step}
    record |= {"stall_seconds": round(outcome.stall_s, 4), "write_seconds": round(outcome.write_s, 4)}
    if outcome.error is None:
        log.write({"event": "checkpoint", **record})
    else:
        log.write({"event": "checkpoint_failed", "error": outcome.error, **record})
        log.say(f"checkpoint of step {outcome.step} could not be written, training continues: {outcome.error}")
    if outcome.warning is not None:
        log.say(f"{outcome.folder} is written, but: {outcome.warning}")
