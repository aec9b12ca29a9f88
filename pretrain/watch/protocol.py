"""What the loop asks of an evaluator, and what it gets. `lrnn.eval.in_run` has one; rooms import only downwards."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from lrnn import LrnnConfig
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine


class Score(NamedTuple):
    """A metric of a task or a group, as lm-eval names it."""

    task: str
    metric: str
    filter: str  # of answers; "none" for most tasks
    value: float
    stderr: float | None

    @property
    def key(self) -> str:
        """Return the name within the task: the metric, with the filter behind a comma if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric},{self.filter}"


class Sample(NamedTuple):
    """A prompt and the text that the model wrote after it."""

    prompt: str
    text: str


class Wants(NamedTuple):
    """What is due after a step."""

    step: int
    scores: bool
    samples: bool


@dataclass
class Found:
    """What an evaluator found.

    Attributes:
        scores, samples: on the main process; None if they were not wanted, failed, or were interrupted.
        errors: why "scores" or "samples" failed, the same on all ranks.
        interrupted: whether a rank was asked to stop before all was found, the same on all ranks.
    """

    scores: list[Score] | None = None
    samples: list[Sample] | None = None
    errors: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


class Evaluator(Protocol):
    """Computes scores and samples with the present weights of a run."""

    def evaluate(self, engine: Engine, wants: Wants, turn: Callable[[], None], stopped: Callable[[], bool]) -> Found:
        """Return what is wanted. All ranks call this together, and none raises an error that another does not see.

        Args:
            engine: holds the weights, which are only read.
            wants: what is due.
            turn: called on all ranks equally often, at least once per batch of questions: the process is alive.
            stopped: whether this process was asked to stop.
        """


# `make(config, model_config, save_tokenizer, ranks)` is called on all ranks before anything of a run is written. It
# checks what `config.eval` and `config.samples` name, and raises UserError, perhaps on some ranks only.
MakeEvaluator = Callable[[Config, LrnnConfig, Callable[[Path], object], Ranks], Evaluator]
