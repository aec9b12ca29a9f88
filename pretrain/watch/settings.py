"""The sections `eval` and `samples` of a run's YAML file."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from lrnn.paths import IsPath
from lrnn.settings import Section, Unit

Steps = Annotated[int, Unit("steps")]
Tokens = Annotated[int, Unit("tokens")]


class EvalConfig(Section):
    """Scores of lm-eval, measured between steps by all processes: those of `lrnn eval` on an export of the same step.

    Training computes the same, bit for bit, as without them.
    """

    every: Steps = Field(0, ge=0)
    """Interval between evaluations, which are also made after the last step; 0 makes none."""
    suite: str | None = None
    """Suite of `lrnn eval`; `fast` is made for this. Suites that run code written by the model are refused."""
    tasks: list[str] = Field(default_factory=list)
    """Tasks, groups, tags and patterns of lm-eval instead of a suite."""
    limit: Annotated[int | float | None, Unit("documents per task")] = Field(None, gt=0)
    """Number of documents per task, the first ones, or a fraction of them below 1; `null` for all."""
    batch_size: Annotated[int, Unit("sequences")] = Field(8, gt=0)
    """Sequences per batch of a process."""
    max_length: Tokens | None = Field(None, gt=0)
    """Maximum tokens of context; `null` for `max_position_embeddings`, which is `data.seq_len`."""
    truncate: bool = False
    """Cut prompts of `tasks` that are too long from the left instead of refusing them."""
    num_fewshot: Annotated[int | None, Unit("examples")] = Field(None, ge=0)
    """Examples in the prompts of `tasks`; `null` for what each task says."""
    include_path: Annotated[list[str], IsPath()] = Field(default_factory=list)
    """Folders of task files, for `tasks`."""

    @model_validator(mode="after")
    def says_what(self) -> Self:
        if self.every and bool(self.suite) == bool(self.tasks):
            raise ValueError("give either suite or tasks, which are measured every so many steps")
        if "every" not in self.model_fields_set and (self.suite or self.tasks):
            raise ValueError("every is missing: the steps between two evaluations, or 0 for none")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise ValueError(f"limit {self.limit} should be a whole number of documents, or a fraction below 1")
        if self.suite and (self.truncate or self.num_fewshot is not None or self.include_path):
            raise ValueError("a suite has a fixed protocol: truncate, num_fewshot and include_path are for tasks")
        return self


class SamplesConfig(Section):
    """Texts that the model writes between steps, from the same prompts each time."""

    every: Steps = Field(0, ge=0)
    """Interval between samples, which are also generated after the last step; 0 generates none."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Beginnings of documents."""
    prompt_file: Annotated[str | None, IsPath()] = None
    """File of prompts instead: a line each, or, if its name ends in `.jsonl`, rows `{"text": ...}`."""
    max_new_tokens: Tokens = Field(64, gt=0)
    """Largest number of tokens that are generated for a prompt; less if the document ends before."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the most likely token each time, so that samples of two runs can be compared. Above it tokens are drawn,
    from random numbers that the run's seed, the step and the prompt decide."""

    @model_validator(mode="after")
    def says_what(self) -> Self:
        if self.every and bool(self.prompts) == (self.prompt_file is not None):
            raise ValueError("give either prompts or prompt_file, which are continued every so many steps")
        if "every" not in self.model_fields_set and (self.prompts or self.prompt_file is not None):
            raise ValueError("every is missing: the steps from samples to samples, or 0 for none")
        return self
