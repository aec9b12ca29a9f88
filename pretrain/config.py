"""The configuration of a pretraining run: its schema, the YAML file and `key.sub=value` overrides.

Unknown keys and wrong types stop the program with the key's full path. Model and engine are described by files that
people already know: a Hugging Face `config.json` and a DeepSpeed JSON.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lrnn.pretrain.batching import Batching
from lrnn.settings import Section, load

DAY_SECONDS = 24 * 3600


class CorpusSource(Section):
    path: str  # folder written by `lrnn corpus`
    weight: float = Field(1.0, gt=0)  # share of the samples, relative to the other corpora


class StreamSource(Section):
    """Arguments of `datasets.load_dataset(..., streaming=True)`, tokenised while training."""

    path: str  # hub name, or a builder such as "json" or "parquet" with data_files
    tokenizer: str  # SentencePiece .model, or a Hugging Face tokenizer
    name: str | None = None
    split: str = "train"
    data_files: str | list[str] | None = None
    text_column: str = "text"
    shuffle_buffer: int = Field(0, ge=0)  # documents; 0 keeps the order of the source


class DataConfig(Section):
    seq_len: int = Field(gt=0)  # tokens a sample
    corpora: list[CorpusSource] = Field(default_factory=list)
    stream: StreamSource | None = None
    reset_at_document_boundaries: bool = False  # start each document from a zero state

    @model_validator(mode="after")
    def one_source(self):
        if bool(self.corpora) == (self.stream is not None):
            raise ValueError("give either corpora (written by `lrnn corpus`) or stream, not both and not neither")
        return self


class OptimConfig(Section):
    lr: float = Field(gt=0)  # peak learning rate
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # on matrices alone


class ScheduleConfig(Section):
    name: Literal["cosine", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int = Field(0, ge=0)  # wsd: steps of linear decay at the end
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # final learning rate / peak


class CheckpointConfig(Section):
    every: int = Field(1000, gt=0)  # steps
    keep_last: int = Field(2, gt=0)
    keep_every: int = Field(0, ge=0)  # also keep the steps that this divides; 0: none
    background: bool = True  # write while training goes on; takes host memory for a copy of the state


class SpikeConfig(Section):
    """A loss above the median of the last `window` by more than `threshold` standard deviations is a spike."""

    action: Literal["log", "skip", "rollback"] = "log"  # rollback: to the newest checkpoint, with the data that follows
    threshold: float = Field(6.0, gt=0)  # standard deviations
    window: int = Field(128, ge=4)  # steps
    max_rollbacks: int = Field(3, gt=0)  # to the same checkpoint, after which the run stops


class LogConfig(Section):
    every: int = Field(10, gt=0)  # steps
    heldout_every: int = Field(0, ge=0)  # steps between held-out losses; 0: never
    heldout_batches: int = Field(8, gt=0)  # micro-batches, over all processes
    tensorboard: bool = True
    wandb_project: str | None = None


class WatchdogConfig(Section):
    """Seconds after which a run counts as hung and ends. A day at most: then the collectives themselves give up."""

    lost_seconds: float = Field(120, gt=0, le=DAY_SECONDS)  # without a sign of life from a process
    stall_seconds: float = Field(600, gt=0, le=DAY_SECONDS)  # in which no process enters a new phase of its step
    startup_seconds: float = Field(3600, gt=0, le=DAY_SECONDS)  # the same up to the end of the first step
    heartbeat_seconds: float = Field(60, gt=0, le=DAY_SECONDS)  # between lines that say which phase is taking long


class Config(Section):
    run_dir: str  # everything the run writes; a run is resumed from what is there
    model: str  # Hugging Face config.json of the model
    deepspeed: str  # DeepSpeed JSON; batch sizes are filled in
    steps: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)  # samples an optimizer step, over all processes
    micro_batch_size: int = Field(gt=0)  # samples a forward pass of one process
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spikes: SpikeConfig = SpikeConfig()
    log: LogConfig = LogConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    seed: int = Field(0, ge=0)
    activation_checkpointing: bool = False
    max_skipped_steps: int = Field(5, gt=0)  # steps in a row that are not applied, after which the run stops

    @model_validator(mode="after")
    def schedule_fits(self):
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} + schedule.decay_steps "
                f"{self.schedule.decay_steps} is more than steps {self.steps}"
            )
        return self

    def batching(self, rank: int, world_size: int) -> Batching:
        """Return the batch sizes with this process's place among `world_size`. Raises UserError; see `Batching`."""
        return Batching(self.global_batch_size, self.micro_batch_size, rank, world_size)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML file; see `load`."""
    return load(Config, path, overrides)
