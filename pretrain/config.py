"""The configuration of a pretraining run: the schema of its YAML file.

Unknown keys and wrong types stop the program with the key's full path. The text below a field is its entry in the
configuration reference (`docs/make_configuration.py`). The model is described by a Hugging Face `config.json`, by the
fields of one, or by both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lrnn import LrnnConfig, shipped
from lrnn.errors import UserError
from lrnn.model_config import check_changes_count, model_config_from
from lrnn.paths import IsPath
from lrnn.pretrain import old_config
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.init_from.model import fields_of_begun
from lrnn.pretrain.watch.settings import EvalConfig, SamplesConfig
from lrnn.settings import BASE, FileOrFields, Section, Unit, load, read_json, validate

DAY_SECONDS = 24 * 3600
ONE_SOURCE = "give exactly one of corpora (written by `lrnn corpus`) and stream"
# Builders of `datasets`, which takes a builder before a folder of that name.
BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text", "xml", "webdataset"})

Steps = Annotated[int, Unit("steps")]
Samples = Annotated[int, Unit("samples")]
Seconds = Annotated[float, Unit("seconds")]


class CorpusSource(Section):
    """A corpus that the run trains on."""

    path: Annotated[str, IsPath()]
    """Folder written by `lrnn corpus`."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other corpora."""


class StreamSource(Section):
    """What to stream, as for `lrnn corpus --streaming`; the text is tokenised while training."""

    path: Annotated[str, IsPath(only_if_exists=True, never=BUILDERS)]
    """File, folder, URL, name on the Hugging Face hub, or a builder such as `json` or `parquet` with `data_files`."""
    tokenizer: Annotated[str, IsPath(only_if_exists=True)]
    """SentencePiece `.model`, or a Hugging Face tokenizer."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    data_files: Annotated[str | list[str] | None, IsPath(only_if_exists=True, within="path")] = None
    """Files that the builder reads, or files of the folder `path`."""
    text_column: str = "text"
    """Column that holds the text."""
    kind: Literal["text", "json", "csv", "parquet", "arrow"] | None = None
    """Read files as this; `null` to look at their names and first bytes."""
    sample_by: Literal["document", "line"] | None = None
    """Whether a document of text files is a file or a line; `null`: a file, but a line with the builder `text`."""
    skip_bad_files: bool = False
    """Leave out and count files, or the rest of files, that cannot be read, instead of ending the run."""
    skip_bad_rows: bool = False
    """Leave out and count rows that are broken, not UTF-8 or without text, instead of ending the run."""
    shuffle_buffer: Annotated[int, Unit("documents")] = Field(0, ge=0)
    """Number of documents that are shuffled among each other; 0 keeps the order of the source."""


class DataConfig(Section):
    """The data that the run trains on: either `corpora` or `stream`, or neither if every stage has its own corpora."""

    seq_len: Annotated[int, Unit("tokens")] = Field(gt=0)
    """Length of a sample. It is also the `max_position_embeddings` of the model, its export and its evaluation, which
    is the longest of the stages, if there are any."""
    corpora: list[CorpusSource] = Field(default_factory=list)
    """Corpora written by `lrnn corpus`, mixed by weight."""
    stream: StreamSource | None = None
    """A streamed data set."""
    reset_at_document_boundaries: bool = False
    """Start each document from a zero state."""
    state_passing: Annotated[bool | Annotated[int, Field(ge=2)], Unit("samples")] = False
    """Number of consecutive samples of a corpus that a row of the batch reads one after the other, each from the state
    that the one before left, without gradients through it. `true`: as many as the smallest corpus has for each row.
    Needs `corpora`, and a window in attention layers."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if self.corpora and self.stream is not None:
            raise ValueError(ONE_SOURCE)
        if self.state_passing and self.stream is not None:
            raise ValueError("state_passing needs corpora, because a stream is read in one place; set it to false")
        return self


class MuonConfig(Section):
    """Muon, which `optim.name: muon` uses for matrices. `lr` and `weight_decay` are those of `optim`."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate of the matrices; `null` for `optim.lr`."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the moving average of the gradient."""
    nesterov: bool = True
    """Orthogonalize the average with the gradient of the step added once more."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor of a matrix's learning rate: `match_rms_adamw` is 0.2 sqrt(max(rows, columns)), with which updates are as
    large as those of AdamW (Moonlight); `original` is sqrt(max(1, rows / columns)), which takes a larger `lr`."""
    per_head: bool = False
    """Orthogonalize the rows of each head of a projection by themselves, and the columns of each head of `o_proj`."""


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of blocks with Muon, and embeddings, head, norms, gates, decays, biases and
    convolutions with AdamW."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, on the weights of linear maps only."""
    decay_embeddings: bool = True
    """Whether embeddings count as linear maps. A head that is tied to them is treated as they are."""
    z_loss: float = Field(0.0, ge=0)
    """Coefficient of the z-loss, log(sum(exp(logits)))^2 as a mean over labels, whose gradient is added to that of the
    cross-entropy; PaLM has 1e-4. Recorded losses are the cross-entropy alone, and `z_loss` is coefficient times mean. 0
    turns it off."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient over all parameters; a larger one is scaled down to it. 0 turns clipping off."""
    muon: MuonConfig = MuonConfig()
    """Settings of Muon, read if `name` is `muon`."""


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    name: Literal["cosine", "wsd"] = "cosine"
    """`cosine` decays from the end of the warm-up on; `wsd` (warm-up, stable, decay) stays at the peak before."""
    warmup_steps: Steps = Field(0, ge=0)
    """Linear warm-up from zero."""
    decay_steps: Steps = Field(0, ge=0)
    """Linear decay at the end of `wsd`; `cosine` does not read it."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate divided by the peak."""


RUN_OF_ITS_OWN = "make the stage a run of its own that begins with init_from of the run before"


class StageConfig(Section):
    """The stages of a run, one after the other. A stage takes from the run what it does not give itself."""

    name: str | None = Field(None, min_length=1)
    """What messages, metrics and plots call the stage; `null`: `stage 1`, `stage 2` and so on."""
    steps: Steps | None = Field(None, gt=0)
    """Length in optimizer steps. Give either this or `tokens`."""
    tokens: Annotated[int | None, Unit("tokens")] = Field(None, gt=0)
    """Length in tokens, rounded up to whole steps."""
    corpora: list[CorpusSource] = Field(default_factory=list)
    """Corpora of the stage, mixed by weight; empty: `data.corpora`."""
    seq_len: Annotated[int | None, Unit("tokens")] = Field(None, gt=0)
    """Length of a sample; `null`: `data.seq_len`."""
    global_batch_size: Samples | None = Field(None, gt=0)
    """Samples per optimizer step, over all processes; `null`: that of the run."""
    micro_batch_size: Samples | None = Field(None, gt=0)
    """Samples per forward pass of one process; `null`: that of the run."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; `null`: `optim.lr`."""
    schedule: ScheduleConfig | None = None
    """The learning rate over the steps of this stage alone; `null`: `schedule`, which runs over the whole run."""

    @model_validator(mode="before")
    @classmethod
    def has_own_keys(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields and name in (*Config.model_fields, "state_passing"):
                raise ValueError(f"{name} is no key of a stage, because all stages share it; {RUN_OF_ITS_OWN}")
        return values

    @model_validator(mode="after")
    def one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and which of them are kept."""

    every: Steps = Field(1000, gt=0)
    """Interval between checkpoints. A killed run repeats at most this many steps, plus those taken while a checkpoint
    was written in the background."""
    keep_last: Annotated[int, Unit("checkpoints")] = Field(2, gt=0)
    """Number of newest checkpoints that are kept."""
    keep_every: Steps = Field(0, ge=0)
    """Checkpoints at multiples of this step are kept too; 0 keeps none of them."""
    background: bool = True
    """Write while training continues. This takes host memory for a copy of the training state."""


class SpikeConfig(Section):
    """A loss above the median of the last `window` losses by more than `threshold` standard deviations is a spike."""

    action: Literal["log", "skip", "rollback"] = "log"
    """`log` applies the step and records the spike, `skip` leaves the step out, `rollback` returns to the newest
    checkpoint and continues with the data that follow the spike."""
    threshold: Annotated[float, Unit("standard deviations")] = Field(6.0, gt=0)
    """Distance from the median above which a loss is a spike."""
    window: Steps = Field(128, ge=4)
    """Number of losses that the median and the deviation are taken over. No loss is a spike before half of them are
    known."""
    max_rollbacks: int = Field(3, gt=0)
    """Number of rollbacks to the same checkpoint, after which the run stops."""


class LogConfig(Section):
    """Records of the run, and where they go."""

    every: Steps = Field(10, gt=0)
    """Interval between records in `metrics.jsonl`."""
    heldout_every: Steps = Field(0, ge=0)
    """Interval between held-out losses; 0 measures none."""
    heldout_batches: Annotated[int, Unit("micro-batches")] = Field(8, gt=0)
    """Size of the held-out measurement, over all processes."""
    tensorboard: bool = True
    """Write TensorBoard files too."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to."""


class ProfileConfig(Section):
    """Which steps are profiled, into `run_dir/profile`. Profiling changes no result; profiled steps take longer."""

    steps: Annotated[list[Annotated[int, Field(ge=1)]] | None, Unit("steps")] = Field(None, min_length=2, max_length=2)
    """First and last step of which each process writes a trace of `torch.profiler` and, on a GPU, a memory snapshot;
    `null` for none."""


class WatchdogConfig(Section):
    """Limits after which a run counts as hung and ends. They are at most a day, after which collectives fail anyway."""

    lost_seconds: Seconds = Field(120, gt=0, le=DAY_SECONDS)
    """Time without a sign of life from a process."""
    stall_seconds: Seconds = Field(600, gt=0, le=DAY_SECONDS)
    """Time in which no process enters a new phase of its step."""
    startup_seconds: Seconds = Field(3600, gt=0, le=DAY_SECONDS)
    """Time in which no process enters a new phase, until the end of the first step."""
    heartbeat_seconds: Seconds = Field(60, gt=0, le=DAY_SECONDS)
    """Interval between messages that say which phase is taking long."""


def _without_default(schema: dict[str, Any]) -> None:
    """Leave the default out of a JSON schema, where it stands for a value that follows from other keys."""
    del schema["default"]


class Config(Section):
    """A pretraining run."""

    named: ClassVar = shipped.RUNS

    run_dir: Annotated[str, IsPath(holds="run.yaml")]
    """Folder that everything is written to. A run is resumed from what is in it."""
    model: Annotated[str | dict[str, Any] | None, FileOrFields(), IsPath(names=shipped.MODELS)] = None
    """Hugging Face `config.json` of the model, the name of one that comes with lrnn, or a mapping of its fields. In a
    mapping, `base` names a `config.json` that the other fields change; `model.hidden_size=512` on the command line is
    such a change. With `init_from` it may be left out, or a mapping without `base` that changes the folder's model."""
    init_from: Annotated[str | None, IsPath()] = None
    """Begin with the weights of a folder instead of random ones: an export or what `lrnn import` wrote, a model folder
    of fla or `olmo_hybrid`, a run, or a checkpoint. A run that resumes does not read it."""
    zero: Literal[1, 2, 3] | None = None
    """ZeRO stage of DeepSpeed: 1 shards the optimizer's state over the processes, 2 the gradients too, 3 the parameters
    too. 2 unless `deepspeed` is given."""
    precision: Literal["fp8", "bfloat16", "float32"] | None = None
    """Precision of the modules; parameters, gradients and their reduction are float32 in each case. `bfloat16` unless
    `deepspeed` is given. `fp8` is `bfloat16` but for the projections of (gated) DeltaNet and the MLPs: their outputs
    and the gradients of their inputs are products of float8 numbers, with a scale per token. It takes `fused_layers`
    and a GPU of compute capability 8.9 or above. On CPUs without AVX-512, `float32` is several times as fast."""
    deepspeed: Annotated[str | None, IsPath()] = None
    """DeepSpeed JSON, for settings that `zero` and `precision` do not cover. Batch sizes and clipping are filled in."""
    steps: Steps = Field(0, gt=0, json_schema_extra=_without_default)
    """Length of the run in optimizer steps. It is required without `stages`; with them it is the sum of their lengths,
    and may be left out."""
    global_batch_size: Samples = Field(gt=0)
    """Samples per optimizer step, over all processes."""
    micro_batch_size: Samples = Field(gt=0)
    """Samples per forward pass of one process."""
    stages: list[StageConfig] = Field(default_factory=list)
    """Parts of the run, one after the other, with data, lengths and sizes of their own; empty: the run is one part."""
    data: DataConfig
    """Data that the run trains on."""
    optim: OptimConfig
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written."""
    spikes: SpikeConfig = SpikeConfig()
    """What happens when the loss jumps."""
    log: LogConfig = LogConfig()
    """Records of the run."""
    eval: EvalConfig = EvalConfig()
    """Scores of lm-eval while the run trains."""
    samples: SamplesConfig = SamplesConfig()
    """Texts that the model writes while the run trains."""
    profile: ProfileConfig = ProfileConfig()
    """Which steps are profiled."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a run counts as hung."""
    seed: int = Field(0, ge=0)
    """Seed of the weights and of the order of the data."""
    activation_checkpointing: Literal["none", "mlp", "full"] = "none"
    """What the backward pass computes again, which saves memory and costs time: `mlp` the gate and up projections of
    MLPs, which takes `fused_layers`; `full` whole layers. `true` and `false` mean `full` and `none`."""
    fused_layers: bool | None = None
    """Train with layers that run their forward and backward passes in fused kernels and merged products; `null` on GPUs
    in bfloat16. Results differ from those of plain layers by rounding."""
    max_skipped_steps: Steps = Field(5, gt=0)
    """Number of steps in a row that are not applied, after which the run stops."""

    @model_validator(mode="after")
    def has_model(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("key model is missing; give it, or init_from to train the model of a folder")
        return self

    @model_validator(mode="after")
    def has_engine(self) -> Self:
        if self.deepspeed is None:
            self.zero = self.zero or 2
            self.precision = self.precision or "bfloat16"
        return self

    @field_validator("data")
    @classmethod
    def has_data(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        stages = info.data.get("stages")  # None if they are wrong themselves
        of_stages = stages is None or (stages and all(stage.corpora for stage in stages))
        if not (data.corpora or data.stream or of_stages):
            raise ValueError(ONE_SOURCE)
        return data

    @model_validator(mode="after")
    def stages_fit(self) -> Self:
        if not self.stages and not self.steps:
            raise ValueError("key steps is missing")
        if self.stages and self.data.stream is not None:
            raise ValueError(
                "stages take corpora, and data.stream is a stream; build a corpus of it with `lrnn corpus`"
            )
        if self.stages and self.data.state_passing:
            raise ValueError(f"data.state_passing does not go with stages; set it to false, or {RUN_OF_ITS_OWN}")
        names = self.stage_names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"stages: {names.count(twice[0])} of them have the name {twice[0]!r}; give each its own")
        lengths = self.stage_steps
        if self.stages and self.steps not in (0, sum(lengths)):
            raise ValueError(_difference_of_lengths(names, lengths, self.steps))
        self.steps = self.steps or sum(lengths)
        for i, (name, stage, steps) in enumerate(zip(names, self.stages, lengths, strict=True)):
            if stage.schedule is not None:
                _check_schedule(stage.schedule, f"stages.{i}.schedule", f"the {steps} steps of {name}", steps)
        return self

    @property
    def stage_names(self) -> list[str]:
        """Return what each stage is called."""
        return [stage.name or f"stage {number}" for number, stage in enumerate(self.stages, start=1)]

    @property
    def stage_steps(self) -> list[int]:
        """Return the length of each stage in steps."""
        lengths = []
        for stage in self.stages:
            samples, seq_len = stage.global_batch_size or self.global_batch_size, stage.seq_len or self.data.seq_len
            lengths.append(stage.steps or -(-(stage.tokens or 0) // (samples * seq_len)))
        return lengths

    @model_validator(mode="after")
    def schedule_fits(self) -> Self:
        _check_schedule(self.schedule, "schedule", f"steps {self.steps}", self.steps)
        return self

    def batching(self, rank: int, world_size: int) -> Batching:
        """Return the batch sizes with this process's place among `world_size`. Raises UserError; see `Batching`."""
        return Batching(self.global_batch_size, self.micro_batch_size, rank, world_size)

    @model_validator(mode="after")
    def profile_fits(self) -> Self:
        steps = self.profile.steps
        if steps is not None and not steps[0] <= steps[1] <= self.steps:
            wrong = "its first step comes after its last" if steps[0] > steps[1] else f"the run has {self.steps} steps"
            raise ValueError(f"profile.steps is {steps}, but {wrong}; give the first and the last step to profile")
        return self


def _check_schedule(schedule: ScheduleConfig, key: str, most: str, steps: int) -> None:
    """Raise ValueError if a schedule is longer than the steps that it runs over, which the message calls `most`."""
    if schedule.warmup_steps + schedule.decay_steps > steps:
        raise ValueError(
            f"{key}.warmup_steps {schedule.warmup_steps} + {key}.decay_steps {schedule.decay_steps} is more than {most}"
        )


def _difference_of_lengths(names: Sequence[str], lengths: Sequence[int], steps: int) -> str:
    """Return how the stages miss the length of the run, for a message."""
    listing, end = ", ".join(f"{name} {length}" for name, length in zip(names, lengths, strict=True)), sum(lengths)
    missed = f"steps {end + 1} to {steps} belong to no stage" if end < steps else f"they are {end - steps} too many"
    return f"steps is {steps}, and the stages have {end} steps ({listing}): {missed}; set steps to {end}, or remove it"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file of a run; see `lrnn.settings.load`. Old ways to say things are converted with a notice."""
    return load(Config, path, overrides, old_config.convert, notice=old_config.notice)


def parse_config(raw: dict, origin: str) -> Config:
    """Return the configuration of a run from parsed YAML, as `load_config` does from a file."""
    return validate(old_config.convert(raw, origin), origin, Config)


def load_model_of(config: Config) -> LrnnConfig:
    """Return the model that a run trains, with `max_position_embeddings` set from `data.seq_len`, or the longest stage.

    Raises:
        UserError: see `lrnn.model_config.model_config_from` and `check_changes_count`.
    """
    raw, origin = _fields_of(config)
    model = model_config_from(raw, origin)
    if isinstance(config.model, dict) and (BASE in config.model or config.init_from is not None):
        check_changes_count(model, config.model)
    length = max([stage.seq_len or config.data.seq_len for stage in config.stages], default=config.data.seq_len)
    old_config.check_sequence_length(raw, length, origin.removeprefix("model configuration "))
    model.max_position_embeddings = length
    return model


def _fields_of(config: Config) -> tuple[dict[str, Any], str]:
    """Return the fields of the model of a run, whether it describes the whole of it or begins from a folder."""
    model = config.model
    if config.init_from is None or isinstance(model, str) or (model is not None and BASE in model):
        assert model is not None
        return model_fields(model)
    return fields_of_begun(config.init_from, config.run_dir, model or {})


def model_fields(model: str | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields that the key `model` of a run gives, and what to call them in messages.

    Raises:
        UserError: the file cannot be read, or `base` is not a path.
    """
    if isinstance(model, str):
        return read_json(model, "model configuration"), f"model configuration {model}"
    if BASE not in model:
        return model, "model"
    base = model[BASE]
    if not isinstance(base, str):
        raise UserError(f"key model.base = {base!r} should be the path of a JSON file")
    changes = {name: value for name, value in model.items() if name != BASE}
    origin = f"model configuration {base} with changed {', '.join(changes)}"
    return read_json(base, "model configuration") | changes, origin
