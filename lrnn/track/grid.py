"""Read the grid that `lrnn track` trains, tasks x models x eigenvalue ranges x seeds, from a YAML file."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lrnn import LrnnConfig, shipped
from lrnn.errors import UserError
from lrnn.model.mixers import MIXERS
from lrnn.model.pattern import read_pattern
from lrnn.model_config import model_config_from
from lrnn.paths import IsPath
from lrnn.settings import Section, Unit, load, validate
from lrnn.track.tasks.base import Task
from lrnn.track.tasks.counter_rng import MAX_SEED
from lrnn.track.tasks.registry import make_task

Range = Literal["negative", "positive"]
Tokens = Annotated[int, Unit("tokens")]
Sequences = Annotated[int, Unit("sequences")]
LONGEST_NAME = 200  # bytes of a task's or model's name; file systems take 255, and a plot's name holds more
NO_RANGE = "none"  # the range, in results, of mixers that have none
UNIMPORTANT = {"log_every", "checkpoint_seconds", "cuda_graphs", "concurrent"}  # settings that do not change results
OF_THE_GRID = {"min_length", "max_length", "concurrent"}  # training settings that a model cannot override
RANGE_NAMES = {"negative": "[-1, 1]", "positive": "[0, 1]", NO_RANGE: "-"}


class Stage(Section):
    """A stage of a curriculum: the same model trains on an easier task first. Values not given are those of `train`."""

    steps: Annotated[int, Unit("steps")] = Field(gt=0)
    """Length of the stage."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task that differ in this stage."""
    min_length: Tokens | None = Field(None, gt=0)
    """Shortest sequence."""
    max_length: Tokens | None = Field(None, gt=0)
    """Longest sequence."""
    batch_size: Sequences | None = Field(None, gt=0)
    """Sequences per step."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    state_passing: float | None = Field(None, ge=0, lt=1)
    """Probability that a sequence continues from the previous one; see `train`."""


class TrainSettings(Section):
    """How every model of the grid is trained, with AdamW."""

    min_length: Tokens = Field(gt=0)
    """Shortest sequence."""
    max_length: Tokens = Field(gt=0)
    """Longest sequence. It is also the `max_position_embeddings` of the model."""
    steps: Annotated[int, Unit("steps")] = Field(gt=0)
    """Length of the training, without its curriculum."""
    batch_size: Sequences = Field(gt=0)
    """Sequences per step."""
    lr: float = Field(gt=0)
    """Peak learning rate: linear warm-up over the first 10% of the steps, then a cosine down to `min_lr`."""
    min_lr: float = Field(1e-6, ge=0)
    """Final learning rate."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """Decay of the moving averages of the gradient and of its square."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, on the weights of linear maps only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down to it."""
    state_passing: float = Field(0.0, ge=0, lt=1)
    """Probability that a sequence continues, in state and answers, from the end of the previous sequence in its row of
    the batch, provided that all answers there were right. Gradients stay within a sequence; states do not."""
    log_every: Annotated[int, Unit("steps")] = Field(100, gt=0)
    """Interval between records."""
    checkpoint_seconds: Annotated[float, Unit("seconds")] = Field(60.0, gt=0)
    """Interval between checkpoints."""
    cuda_graphs: bool = True
    """On a GPU, replay a step as one captured graph."""
    concurrent: Annotated[int, Unit("trainings")] = Field(6, ge=1, le=32)
    """Number of trainings that run at once on a GPU."""
    curriculum: list[Stage] = Field(default_factory=list)
    """Stages that are trained first, in turn, each with its own optimizer and schedule."""


class TestSettings(Section):
    """How every model of the grid is tested."""

    min_length: Tokens = Field(gt=0)
    """Shortest sequence."""
    max_length: Tokens = Field(gt=0)
    """Longest sequence."""
    samples: Sequences = Field(8192, gt=0)
    """Number of test sequences."""
    batch_size: Sequences = Field(512, gt=0)
    """Largest number of sequences at once. Long sequences are tested in smaller batches."""


class GridConfig(Section):
    """A grid of trainings: tasks x models x ranges x seeds."""

    named: ClassVar = shipped.GRIDS

    out: Annotated[str, IsPath(holds="grid.yaml")]
    """Folder of all results."""
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name in the results, and below it `task:` with the parameters of the task."""
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name in the results, and below it fields of the model's `config.json`, and `train:` with the training settings
    that this model has for itself."""
    ranges: list[Range] = Field(["negative", "positive"], min_length=1)
    """Eigenvalue ranges to train each model with, if it has any: `negative` is [-1, 1], `positive` is [0, 1]."""
    seeds: list[Annotated[int, Field(ge=0, lt=MAX_SEED)]] = Field([0, 1, 2], min_length=1)
    """Seeds of the weights and of the samples."""
    train: TrainSettings
    """How every model is trained."""
    test: TestSettings
    """How every model is tested."""


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    task_name: str
    model_name: str
    range: str  # a Range, or NO_RANGE
    seed: int
    task: Task
    model_config: LrnnConfig
    train: TrainSettings  # the grid's settings with the model's own values
    test: TestSettings
    curriculum: tuple[tuple[Task, TrainSettings], ...]  # stages trained first
    folder: Path  # of its results
    fingerprint: str  # hash of everything that decides the result: task, model, range, seed, training and test

    @property
    def stages(self) -> tuple[tuple[Task, TrainSettings], ...]:
        """Return all stages in order. The task itself comes last."""
        return *self.curriculum, (self.task, self.train)

    def __str__(self) -> str:
        return f"{self.task_name}, {self.model_name} {RANGE_NAMES[self.range]}, seed {self.seed}"


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> tuple[GridConfig, list[Cell]]:
    """Read a grid, and check all its cells before any is trained.

    Raises:
        UserError: the file is wrong (see `lrnn.settings.load`), or a task, a model or a length does not exist.
    """
    grid = load(GridConfig, path, overrides)
    _check_names(grid, str(path))
    cells = list(_cells(grid, str(path)))
    for cell in cells:
        for task, train in cell.stages:
            task.sizes(train.min_length, train.max_length)
            _check_state_passing(task, train, cell.model_config, f"{path}: {cell}")
        cell.task.sizes(cell.test.min_length, cell.test.max_length)
    return grid, cells


def _check_names(grid: GridConfig, origin: str) -> None:
    """Raise UserError, which begins with `origin`, if cells would share a folder, or have none within `out`."""
    for key, names in (("tasks", list(grid.tasks)), ("models", list(grid.models))):
        for name in names:
            if name in ("", ".", "..") or "/" in name or len(name.encode()) > LONGEST_NAME:
                raise UserError(
                    f"{origin}: {key}: {name!r} should be a name of at most {LONGEST_NAME} bytes without /, which "
                    "folders and plots can have"
                )
    for key, values in (("ranges", grid.ranges), ("seeds", grid.seeds)):
        for value, count in Counter[Any](values).items():
            if count > 1:
                raise UserError(f"{origin}: {key}: {value!r} is given twice; remove one")


def _check_state_passing(task: Task, train: TrainSettings, config: LrnnConfig, origin: str) -> None:
    """Raise UserError, which begins with `origin`, if sequences cannot continue from previous ones."""
    if not train.state_passing:
        return
    if task.answer_table is None:
        able = "parity, group_word, modular_arithmetic and modular_arithmetic_brackets"
        raise UserError(f"{origin}: train.state_passing is for {able}, whose sequences can be joined")
    for unable in (name for name in config.mixers if not MIXERS[name].begins_with_zeros):
        names = ", ".join(name for name, mixer in MIXERS.items() if mixer.begins_with_zeros)
        raise UserError(f"{origin}: train.state_passing is for the mixers {names}, not for {unable}")


def _settings_said(train: TrainSettings) -> dict[str, Any]:
    """Return the settings that enter a fingerprint. Those added in later versions enter only if they are used."""
    said = train.model_dump(exclude=UNIMPORTANT)
    for settings, unused in ((said, 0), *((stage, None) for stage in said["curriculum"])):
        if settings["state_passing"] == unused:
            del settings["state_passing"]
    return said


def changed_fields(config: LrnnConfig) -> dict[str, Any]:
    """Return the fields that differ from their defaults, so that a field added later changes no fingerprint."""
    defaults = LrnnConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    """Begin a UserError that is raised in the `with` block with `origin`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _make_task(parameters: dict[str, Any]) -> Task:
    return make_task(parameters["task"], **{name: value for name, value in parameters.items() if name != "task"})


def _cells(grid: GridConfig, origin: str) -> Iterator[Cell]:
    for task_name, parameters in grid.tasks.items():
        if "task" not in parameters:
            raise UserError(f"{origin}: tasks.{task_name} should have a key task, such as task: parity")
        with _naming(f"{origin}: tasks.{task_name}"):
            task = _make_task(parameters)
        for model_name, fields in grid.models.items():
            fields = dict(fields)
            train = _train_settings(grid, fields.pop("train", {}), f"{origin}: models.{model_name}.train")
            curriculum = tuple(_curriculum(task, parameters, train, f"{origin}: tasks.{task_name}"))
            for range_ in grid.ranges if has_range(fields, f"{origin}: models.{model_name}") else [NO_RANGE]:
                # No id of a task is special to the model: each may be an input or an answer.
                fixed: dict[str, Any] = {"vocab_size": task.vocab_size, "allow_neg_eigval": range_ == "negative"}
                fixed |= {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": grid.train.max_length}
                for name in fixed.keys() & fields.keys():
                    raise UserError(f"{origin}: models.{model_name}.{name} is set by the grid; remove it")
                config = model_config_from(fields | fixed, f"{origin}: models.{model_name}")
                for seed in grid.seeds:
                    folder = Path(grid.out) / task_name / model_name / range_ / f"seed-{seed}"
                    facts = [parameters, changed_fields(config), seed]
                    facts += [_settings_said(train), grid.test.model_dump(exclude=UNIMPORTANT)]
                    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
                    yield Cell(
                        task_name, model_name, range_, seed, task, config, train, grid.test, curriculum, folder,
                        fingerprint,
                    )  # fmt: skip


def has_range(fields: dict[str, Any], origin: str) -> bool:
    """Return whether a model's fields name a mixer that has a range of eigenvalues.

    Raises:
        UserError: the range of some layers is given, although the grid sets it. The message begins with `origin`.
    """
    try:
        entries = read_pattern(fields.get("mixer", LrnnConfig().mixer), num_layers=sys.maxsize)
    except ValueError:
        return True  # refused where the configuration is made
    for i, entry in enumerate(entries):
        if "allow_neg_eigval" in entry:
            raise UserError(f"{origin}.mixer[{i}].allow_neg_eigval is set by the grid; remove it")
    return any(MIXERS[entry["mixer"]].ranges is not None for entry in entries)


def _train_settings(grid: GridConfig, own: Any, origin: str) -> TrainSettings:
    """Return the grid's training settings with a model's own values. Raise UserError, which begins with `origin`."""
    if not isinstance(own, dict):
        raise UserError(f"{origin} should be a mapping of training settings, such as lr: 1e-2, not {own!r}")
    for name in sorted(OF_THE_GRID & own.keys()):
        raise UserError(f"{origin}.{name} is set for the whole grid; remove it")
    return validate(grid.train.model_dump() | own, origin, TrainSettings)


def _curriculum(
    task: Task, parameters: dict[str, Any], train: TrainSettings, origin: str
) -> Iterator[tuple[Task, TrainSettings]]:
    """Yield task and settings of each stage before the last. Raise UserError for a task with other ids."""
    for number, stage in enumerate(train.curriculum):
        with _naming(f"{origin}: train.curriculum[{number}].task"):
            easier = _make_task(parameters | stage.task | {"task": parameters["task"]})
        if (easier.vocab_size, easier.pad_id) != (task.vocab_size, task.pad_id):
            raise UserError(
                f"{origin}: train.curriculum[{number}].task makes a task with {easier.vocab_size} ids and padding "
                f"{easier.pad_id}; the task itself has {task.vocab_size} and {task.pad_id}, and the model is shared"
            )
        yield easier, train.model_copy(update=stage.model_dump(exclude={"task"}, exclude_none=True))
