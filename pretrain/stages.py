"""The stages of a run: which steps and samples each has, and the configuration that holds in it.

A run without stages is one stage. Which stage a step belongs to depends on the number of its first sample alone, so it
is the same on any number of processes and after any resume. A rollback leaves samples out, so each later stage begins
that many steps earlier, and the last one is longer by as many steps.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import Config, StageConfig


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        number: counts from 1.
        name: what messages call it.
        config: the configuration of the run with the values of this stage in place of those of the run. It has no
            stages.
        first_step: number of steps before the stage.
        first_sample: number of samples before the stage.
    """

    number: int
    name: str
    config: Config
    first_step: int
    first_sample: int

    @property
    def steps(self) -> int:
        """Length in steps."""
        return self.config.steps

    @property
    def samples(self) -> int:
        """Length in samples."""
        return self.steps * self.config.global_batch_size

    @property
    def title(self) -> str:
        """Return the number of the stage, and its name if it has another."""
        numbered = f"stage {self.number}"
        return numbered if self.name == numbered else f"{numbered} ({self.name})"

    def __str__(self) -> str:
        config = self.config
        shape = f"{config.global_batch_size} x {config.data.seq_len:,} tokens"
        return f"{self.title}, {self.steps} steps of {shape} from step {self.first_step + 1} on"


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run, in order. A run without stages is one stage."""
    stages: list[Stage] = []
    first_step = first_sample = 0
    for name, stage, steps in zip(config.stage_names, config.stages, config.stage_steps, strict=True):
        stages.append(Stage(len(stages) + 1, name, _with(config, stage, steps), first_step, first_sample))
        first_step, first_sample = first_step + steps, first_sample + stages[-1].samples
    return stages or [Stage(1, "the run", config, 0, 0)]


def stages_left(config: Config, samples: int) -> list[Stage]:
    """Return the stages that a run has not ended after so many samples. The last one is always among them.

    Those that are over are not trained again, so their batches need not fit the processes that a run resumes with.
    """
    stages = stages_of(config)
    return [stage for stage in stages if stage is stages[-1] or stage.first_sample + stage.samples > samples]


def stage_at(stages: Sequence[Stage], sample: int) -> Stage:
    """Return the stage of the step whose first sample has this number."""
    return next((stage for stage in reversed(stages) if stage.first_sample <= sample), stages[0])


def steps_left(stages: Sequence[Stage], samples: int, step: int) -> Iterator[tuple[Stage, int]]:
    """Yield each stage that a run has not ended, with the number of its steps that are left.

    Args:
        stages: those of the run.
        samples: number of samples consumed.
        step: number of steps done.
    """
    total = stages[-1].first_step + stages[-1].steps - step
    for stage in stages:
        samples_left = stage.first_sample + stage.samples - max(samples, stage.first_sample)
        steps = min(total, -(-samples_left // stage.config.global_batch_size)) if stage is not stages[-1] else total
        if steps > 0:
            yield stage, steps
            total -= steps


def model_in(stage: Stage, model: LrnnConfig) -> LrnnConfig:
    """Return the model's configuration with the length of the stage's samples, by which its FLOPs are counted."""
    changed = copy.deepcopy(model)
    changed.max_position_embeddings = stage.config.data.seq_len
    return changed


@contextmanager
def naming(stage: Stage, config: Config) -> Iterator[None]:
    """Name the stage in a UserError that is raised in the `with` block, if the run has stages."""
    try:
        yield
    except UserError as error:
        if not config.stages:
            raise
        raise UserError(f"{stage.title}: {error}") from error


def _with(config: Config, stage: StageConfig, steps: int) -> Config:
    """Return the configuration of a run with the values of a stage."""
    data = {"seq_len": stage.seq_len or config.data.seq_len, "corpora": stage.corpora or config.data.corpora}
    changes = {
        "data": config.data.model_copy(update=data),
        "global_batch_size": stage.global_batch_size or config.global_batch_size,
        "micro_batch_size": stage.micro_batch_size or config.micro_batch_size,
        "steps": steps,
        "stages": [],
    }
    return config.model_copy(update=changes)
