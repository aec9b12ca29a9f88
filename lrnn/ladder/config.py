"""The schema of a ladder's YAML file."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lrnn import shipped
from lrnn.ladder.measure.settings import MeasureConfig
from lrnn.paths import FieldsOf, IsPath
from lrnn.pretrain.config import Config
from lrnn.settings import Section, Unit
from lrnn.track.grid import Range

# A name is a part of the names of cells, which are folders, and which `--cells` matches.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Tokens = Annotated[int, Unit("tokens"), Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(gt=0)]


class SizeConfig(Section):
    """A size: what models of it share, and how long they train."""

    model: Annotated[dict[str, Any], IsPath(names=shipped.MODELS)]
    """Fields of the model's `config.json`; `base` may name a file with the others."""
    tokens: list[Tokens] = Field(min_length=1)
    """Lengths of the runs, each rounded up to whole steps."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    run: Annotated[dict[str, Any], FieldsOf(Config)] = Field(default_factory=dict)
    """Keys of `lrnn pretrain` for this size; they change those of the ladder's `run`."""
    gpus: Annotated[int, Unit("GPUs")] = Field(1, gt=0)
    """GPUs that a run is spread over."""
    at_once: Annotated[int, Unit("runs")] = Field(1, gt=0)
    """Number of runs that share a GPU. Small models do not fill it alone."""

    @model_validator(mode="after")
    def shares_or_spreads(self) -> Self:
        if self.gpus > 1 and self.at_once > 1:
            raise ValueError(
                f"gpus {self.gpus} and at_once {self.at_once}: runs on several GPUs share none; set one to 1"
            )
        return self


class ArmConfig(Section):
    """An arm: a kind of model that is compared with others at each size."""

    model: Annotated[dict[str, Any], IsPath(names=shipped.MODELS)]
    """Fields of the model's `config.json` that change those of the size."""
    title: str | None = None
    """What the report calls the arm; `null`: its name."""
    sizes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Fields of the model at single sizes, such as the width of the MLP with which all arms have equally many
    parameters."""
    run: Annotated[dict[str, Any], FieldsOf(Config)] = Field(default_factory=dict)
    """Keys of `lrnn pretrain` for this arm; they change those of the size."""


class LadderGrid(Section):
    """Runs of every combination of these."""

    sizes: list[str] = Field(min_length=1)
    """Names of sizes."""
    arms: list[str] = Field(min_length=1)
    """Names of arms."""
    ranges: list[Range] = Field(["negative", "positive"], min_length=1)
    """Eigenvalue ranges of arms that have any: `negative` is [-1, 1], `positive` is [0, 1]."""
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    """Seeds of the weights and of the order of the data. All runs of a seed come before those of the next one."""
    tokens: list[Tokens] | None = Field(None, min_length=1)
    """Lengths of the runs; `null`: those of the size."""
    lr: LearningRate | Annotated[list[LearningRate], Field(min_length=1)] | None = None
    """Peak learning rates; `null`: that of the size."""


class LadderConfig(Section):
    """A ladder of pretraining runs: sizes x arms x ranges x seeds x lengths."""

    named: ClassVar = shipped.LADDERS

    out: Annotated[str, IsPath(holds="ladder.yaml")]
    """Folder of all runs, results and the report."""
    question: str | None = None
    """What the ladder is to find out. It heads the report."""
    effect: Annotated[float, Unit("nats")] = Field(0.005, gt=0)
    """Difference of losses below which arms count as equal."""
    reference: str | None = None
    """Arm that the other arms of the same range are compared with."""
    run: Annotated[dict[str, Any], FieldsOf(Config)]
    """Keys of `lrnn pretrain` that all runs share. Lengths, seeds, peak learning rates and folders follow from the
    other keys of the ladder."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Part of the steps in which the learning rate rises."""
    decay: float = Field(0.2, ge=0, le=1)
    """Part of the steps in which it falls at the end, with `run.schedule.name: wsd`."""
    sizes: dict[Name, SizeConfig] = Field(min_length=1)
    """The sizes by name."""
    arms: dict[Name, ArmConfig] = Field(min_length=1)
    """The arms by name."""
    grids: list[LadderGrid] = Field(min_length=1)
    """What is run, in this order. A run that several grids name is run once."""
    measure: MeasureConfig = MeasureConfig()
    """What is measured of every trained model."""
    keep: Literal["checkpoints", "export", "nothing"] = "checkpoints"
    """What stays of a run when it has been measured: all of its folder; all but the checkpoints; or nothing. Results
    and report are kept in each case."""

    @model_validator(mode="after")
    def schedule_fits(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than the whole run, 1")
        return self

    @model_validator(mode="after")
    def names_exist(self) -> Self:
        for name, arm in self.arms.items():
            _check_known(f"arms.{name}.sizes", arm.sizes, "size", self.sizes)
        for i, grid in enumerate(self.grids):
            _check_known(f"grids.{i}.sizes", grid.sizes, "size", self.sizes)
            _check_known(f"grids.{i}.arms", grid.arms, "arm", self.arms)
        if self.reference is not None:
            _check_known("reference", [self.reference], "arm", self.arms)
        return self


def _check_known(key: str, given: Any, what: str, known: dict[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{key} names the {what} {name!r}, which is not one of {', '.join(known)}")
