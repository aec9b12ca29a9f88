"""The tasks of a run on its main process: check them once, and score them each time with lm-eval."""

import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval import offline
from lrnn.eval.in_run.crew import Crew
from lrnn.eval.statistics import RESAMPLES
from lrnn.eval.suites import build, harness, hub_data, report, sections
from lrnn.eval.suites.bos import Bos
from lrnn.eval.suites.chunked import ChunkedModel
from lrnn.eval.suites.evaluate import choose_suite, load, named
from lrnn.eval.suites.model import Model
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.suites import RunsCode, find_suite
from lrnn.eval.suites.task_objects import Loaded
from lrnn.pretrain.watch.protocol import Score
from lrnn.pretrain.watch.settings import EvalConfig

OPTION = re.compile(r"--(max-length|num-fewshot|include-path|tasks|truncate)\b")  # those that are keys of `eval` too


class Tasks:
    """The tasks that `eval` names, with their data and their requests, which are the same each time.

    Args:
        settings: the section.
        folder: holds the tokenizer as an export has it.
        tokenizer: the tokenizer.
        bos: ids that a prompt begins with.
        max_length: tokens of context.

    Raises:
        UserError: a task is unknown, its data is missing, it runs code, or its prompts do not fit.
    """

    def __init__(self, settings: EvalConfig, folder: Path, tokenizer: Any, bos: Bos, max_length: int):
        self._request = Request(
            model=folder,
            suite=settings.suite or "",
            tasks=tuple(settings.tasks),
            limit=settings.limit,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            num_fewshot=settings.num_fewshot,
            include_path=tuple(Path(path) for path in settings.include_path),
            truncate=settings.truncate,
        )
        try:
            self._loaded = _load(self._request, max_length)
            build.build(self._loaded, self._request, None)
            build.check_lengths(self._loaded, tokenizer, len(bos.ids), max_length, self._request)
        except RunsCode as error:
            raise UserError(
                f"eval: code written by the model would run in {', '.join(error.tasks)}, and a run does not do that "
                "between its steps; leave it to `lrnn eval` on exported checkpoints, and name other tasks here"
            ) from None
        except UserError as error:
            raise UserError(f"eval: {as_keys(str(error))}") from error

    def scores(self, model: Model, crew: Crew) -> list[Score]:
        """Return the metrics of all tasks, as results.json of `lrnn eval` has them. The other ranks `serve`."""
        for task in self._loaded.tasks.values():
            for instance in task.instances:
                instance.resps, instance.filtered_resps = [], {}
        request = self._request
        lm = SharedModel(model, crew)
        iterations = RESAMPLES if request.tasks else 100
        raw = harness.run_tasks(lm, self._loaded, request.limit, request.seeds, iterations, say=lambda line: None)
        rows = report.metric_rows(raw)
        rows = [*sections.score_rows(rows), *rows]
        return [Score(row["task"], row["metric"], row["filter"], row["value"], row["stderr"]) for row in rows]


class SharedModel(ChunkedModel):
    """Answer requests as a `ChunkedModel` does, with the ranks of a run instead of processes of its own.

    Args:
        model: answers on this rank.
        crew: all ranks.
    """

    def __init__(self, model: Model, crew: Crew):
        super().__init__(model, [], None, quiet=True)
        self._crew = crew

    def _compute(self, waiting: deque[Any]) -> Iterator[tuple[str, list[int], list[Any]]]:
        """Yield each chunk with its answers, round by round."""
        while waiting:
            taken = [waiting.popleft() for _ in range(min(self._crew.size, len(waiting)))]
            found = self._crew.ask([(kind, texts) for _, _, kind, texts in taken])
            for (key, chunk, _, _), answers in zip(taken, found, strict=True):
                yield key, chunk, answers


def as_keys(message: str) -> str:
    """Return a message about options of `lrnn eval` that names the keys of a run instead."""
    return OPTION.sub(lambda found: f"eval.{found[1].replace('-', '_')}", message)


def _load(request: Request, max_length: int) -> Loaded:
    """Return the task objects of a request. A suite reads its data without the hub, as in `lrnn eval`."""
    request.check()
    harness.silence_expected_warnings()
    harness.start_no_processes()
    offline.plain_progress()
    if not request.suite:
        return load(request, named(request), max_length)
    names, _ = choose_suite(request)
    with offline.offline():
        return load(request, _with_data(names, request.suite), max_length)


def _with_data(names: list[str], suite: str) -> list[str]:
    """Return those of a suite's tasks whose data is on this machine. Raise UserError if it needs others."""
    missing = hub_data.missing_tasks(names)
    needed = [name for name in missing if name not in find_suite(suite).optional]
    if needed:
        sets = ", ".join(f"{hub_data.HUB_DATA[hub_data.TASKS[name]].repository} ({name})" for name in needed)
        raise UserError(
            f"the suite {suite!r} needs data sets of the Hugging Face hub that are not on this machine: {sets}; run "
            f"`lrnn eval --fetch --suite {suite}` where the hub can be reached, or set {hub_data.FOLDER} to a folder "
            "of copies"
        )
    return [name for name in names if name not in missing]
