"""What the user asks of `lrnn eval`, and the protocol that makes two results comparable."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrnn.errors import UserError

SEEDS = (0, 1234, 1234, 1234)  # of random, numpy, torch and the few-shot examples: lm-eval's own
LONGEST_NAME = 100  # characters of a result folder's name


@dataclass(frozen=True, kw_only=True)
class Request:
    """A model, a suite or tasks, and how to run them.

    Attributes:
        model: a folder of a model, written by `lrnn export` or by transformers.
        suite: the name of a suite; empty if there are `tasks`.
        tasks: names of lm-eval's tasks, groups and tags, patterns of names, and task files.
        limit: the number of documents of every task, or a fraction of them below 1; None for all.
        num_processes: number of processes, each with a GPU of its own; None for all visible GPUs.
        batch_size: sequences per batch, "auto" or "auto:N".
        bos: the rule of `bos.RULES`.
        num_fewshot, apply_chat_template, fewshot_as_multiturn, system_instruction, gen_kwargs, metadata, seeds,
            include_path: as lm-eval has them.
        truncate: let lm-eval cut prompts that are too long from the left.
    """

    model: Path
    suite: str = ""
    tasks: tuple[str, ...] = ()
    out: Path | None = None
    heldout: Path | None = None
    haystack: Path | None = None
    data_folder: Path | None = None
    limit: float | None = None
    device: str | None = None
    num_processes: int | None = None
    dtype: str | None = None
    batch_size: int | str = 8
    max_length: int | None = None
    bos: str = "auto"
    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int | None, ...] = SEEDS
    include_path: tuple[Path, ...] = ()
    truncate: bool = False
    allow_code_execution: bool = False
    skip_code_execution: bool = False
    skip_missing_data: bool = False

    @property
    def name(self) -> str:
        """The suite, or the tasks, with what is not the default: the name of the result folder in DIR/eval.

        So no results replace those of another protocol, or of all documents.
        """
        tasks = (Path(task).stem if task.endswith(".yaml") else task for task in self.tasks)
        words = [self.suite or "+".join(tasks)]
        shots, chat = self.num_fewshot, self.apply_chat_template
        words += [] if shots is None else [f"{shots}-shot"]
        words += [] if not chat else ["chat"] if chat is True else [f"chat-{chat}"]
        words += ["one-turn"] if chat and not self.multiturn else []
        words += [] if self.bos == "auto" else [f"bos-{self.bos}"]
        words += [] if self.limit is None else [f"first-{self.limit}"]
        said = {"num_fewshot", "apply_chat_template", "fewshot_as_multiturn"}
        others = {key: value for key, value in self.protocol().items() if key not in said}
        words += [f"settings-{_digest(json.dumps(others, sort_keys=True, default=str))}"] if others else []
        name = re.sub(r"[^\w.,+-]+", "_", "-".join(words))
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{_digest(name)}"

    @property
    def code(self) -> Literal["run", "refuse", "skip"]:
        """What to do with tasks that run code written by the model."""
        return "run" if self.allow_code_execution else "skip" if self.skip_code_execution else "refuse"

    @property
    def text(self) -> Path | None:
        """The file of text to hide needles in, if there is one."""
        return self.haystack or self.heldout

    @property
    def folder(self) -> Path:
        """The result folder."""
        return self.model / "eval" / self.name if self.out is None else self.out

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns of a conversation: lm-eval's default with a chat template."""
        return bool(self.apply_chat_template) if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    def protocol(self) -> dict[str, Any]:
        """Return what was asked for beyond the tasks' own files. Results of different protocols do not compare."""
        asked = {
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.multiturn if self.apply_chat_template else None,
            "system_instruction": self.system_instruction,
            "gen_kwargs": dict(self.gen_kwargs),
            "metadata": dict(self.metadata),
            "seeds": list(self.seeds) if self.seeds != SEEDS else None,
        }
        # No examples, 0, were asked for too, although 0 == False.
        return {key: value for key, value in asked.items() if value is not None and value is not False and value != {}}

    def check(self) -> None:
        """Raise UserError if a value cannot be."""
        for name, value in (
            ("--batch-size", self.batch_size),
            ("--max-length", self.max_length),
            ("--num-processes", self.num_processes),
        ):
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        # A comparison with NaN is false.
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise UserError(
                f"--limit must be at least 1, got {self.limit:g}: a whole number of documents, or a fraction of them "
                "between 0 and 1"
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num-fewshot must be at least 0, got {self.num_fewshot}")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UserError("--fewshot-as-multiturn needs --apply-chat-template: turns are part of a conversation")
        for path in self.include_path:
            if not path.is_dir():
                raise UserError(f"--include-path {path} is not a folder; it should hold task files (*.yaml)")
        if self.suite:
            self._check_suite()

    def _check_suite(self) -> None:
        """Raise UserError if an option changes what a suite is."""
        asked = {
            "--num-fewshot": self.num_fewshot is not None,
            "--apply-chat-template": self.apply_chat_template,
            "--system-instruction": self.system_instruction,
            "--gen-kwargs": self.gen_kwargs,
            "--metadata": self.metadata,
            "--include-path": self.include_path,
        }
        if self.haystack is not None and self.suite != "needle":
            raise UserError(f"--haystack is the text of needles, which the suite {self.suite!r} does not have")
        if given := [option for option, value in asked.items() if value]:
            raise UserError(
                f"{', '.join(given)}: a suite has a fixed protocol; name its tasks with --tasks to change it"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
