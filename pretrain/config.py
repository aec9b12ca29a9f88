"""The configuration of a pretraining run: its schema, the YAML file and `key.sub=value` overrides.

Unknown keys and wrong types stop the program with the key's full path. Model and engine are described by files that
people already know: a Hugging Face `config.json` and a DeepSpeed JSON.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lrnn.errors import UserError

DAY_SECONDS = 24 * 3600


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


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
    corpora: list[CorpusSource] = []
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads 3e-4, without a dot, as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML file; see `load`."""
    return load(Config, path, overrides)


def load(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file of a schema and apply `key.sub=value` overrides (values are YAML).

    Raises:
        UserError: the file is missing or no YAML mapping, an override has no `=`, a key is unknown, a value has the
            wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist; give the path of a YAML file such as configs/tiny.yaml")
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"configuration {path} is not UTF-8 text: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"configuration {path} is not a mapping of keys to values")
    for override in overrides:
        key, sep, value = override.partition("=")
        if not (key and sep):
            raise UserError(f"override {override!r} should look like key.sub=value")
        _assign(raw, key, _parse_yaml(value, f"override {override}: the value"))
    return validate(raw, str(path), schema)


def validate(raw: dict, origin: str, schema: type[S] = Config) -> S:  # type: ignore[assignment]
    """Check a parsed configuration against its schema. Raises UserError naming each bad key."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e, origin, schema) for e in error.errors())) from None


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def read_json(path: str | Path, what: str) -> dict:
    """A JSON object from a file. Raises UserError naming `what` where that fails."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} should hold a JSON object, not {type(value).__name__}")
    return value


def name_hint(name: str, valid: Sequence[str]) -> str:
    """What an unknown name should have been."""
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())  # PyYAML explains in several lines
        raise UserError(f"{origin} is not YAML: {reason}") from None


def _assign(raw: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise UserError(f"override {key}: {parent} holds a value, not a section")
    raw[last] = value


def _explain(error: Any, origin: str, schema: type[BaseModel]) -> str:
    path = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        names = list(_section_at(schema, error["loc"][:-1]).model_fields)
        return f"{origin}: unknown key {path}; {name_hint(str(error['loc'][-1]), names)}"
    if error["type"] == "missing":
        return f"{origin}: key {path} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    where = f"key {path} = {error['input']!r}: " if path else ""
    return f"{origin}: {where}{message}"


def _section_at(schema: type[BaseModel], loc: tuple) -> type[BaseModel]:
    section: Any = schema
    for name in loc:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section
