"""Questions of lm-eval, with lrnn's tasks: right answers of benchmarks, program traces, recall and needles.

Programs are asked about by choosing: every possible answer is scored, and the likeliest counts. A small base model then
needs to know the state alone, not also that an answer is due. In recall and needles the answer is generated, as their
suites do, and the right one is also scored in bits per byte, because a small model may generate none.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from lrnn.eval.suites import build, harness
from lrnn.eval.suites.chunked import ChunkedModel, answer
from lrnn.eval.suites.evaluate import load
from lrnn.eval.suites.model import Model
from lrnn.eval.suites.request import Request
from lrnn.ladder.measure.parts import Part
from lrnn.ladder.measure.settings import MeasureConfig, Needles, Recall, Traces
from lrnn.ladder.measures import ALL

CONTEXT = 2**20  # tokens, more than any question has: none is cut
CHUNK = 256  # requests that are answered together

Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """Tasks that are asked together.

    Attributes:
        name: of the group.
        tasks: lm-eval's names, and what results call them.
        context: tokens of the longest question, for tasks that make them as long as the context.
        documents: questions of each length; None for all of a task without lengths.
        longest: the greatest length.
    """

    name: str
    tasks: dict[str, str]
    context: int = CONTEXT
    documents: int | None = None
    longest: int = 0


def groups_of(settings: MeasureConfig) -> Iterator[Group]:
    """Yield the groups of tasks that the settings ask for."""
    if settings.gold:
        yield Group("gold", {f"lrnn_{name}_bpb": name for name in settings.gold})
    match settings.traces:
        case Traces(formats=formats, documents=documents, longest=longest):
            tasks = {f"lrnn_{name}_mc": name.removeprefix("trace_") for name in formats}
            yield Group("traces", tasks, documents=documents, longest=longest)
    match settings.recall:
        case Recall(documents=documents, longest=longest):
            yield Group("recall", {"lrnn_recall_pairs": "pairs"}, documents=documents, longest=longest)
    match settings.needles:
        case Needles(forms=forms, documents=documents, longest=longest):
            tasks = {f"lrnn_needle_{form}": form for form in forms}
            yield Group("needles", tasks, context=longest, documents=documents, longest=longest)


class BatchedByTokens(ChunkedModel):
    """Answer requests in batches that have as many tokens as fit.

    Args:
        model: answers.
        batch_tokens: largest number of tokens that are read at once; at least one request.
    """

    def __init__(self, model: Model, batch_tokens: int):
        super().__init__(model, [], None, quiet=True)
        self._batch_tokens = batch_tokens

    def _answer(self, kind: str, requests: list[Any], quiet: bool) -> list[Any]:
        self._model.batch_size_per_gpu = CHUNK  # it decides the chunks
        return super()._answer(kind, requests, quiet)

    def _compute(self, waiting: deque[Any]) -> Iterator[tuple[str, list[int], list[Any]]]:
        while waiting:
            key, chunk, kind, texts = waiting.popleft()
            # The first is the longest. Prompts for generation are read in pieces: a chunk is one batch.
            tokens = 1 if kind == "generate_until" else len(self._model.tok_encode("".join(texts[0])))
            self._model.batch_size_per_gpu = max(1, min(self._batch_tokens // tokens, CHUNK))
            yield key, chunk, answer(self._model, kind, texts)


def ask(group: Group, export: Path, model: Model, batch_tokens: int, say: Callable[[str], None]) -> Part:
    """Ask a model the questions of a group, and return what came out.

    Raises:
        UserError: data of a benchmark was not fetched.
    """
    harness.silence_expected_warnings()
    lm = BatchedByTokens(model, batch_tokens)
    request = Request(model=export, tasks=tuple(group.tasks))
    loaded = load(request, list(group.tasks), group.context)
    for task in loaded.tasks.values():
        if group.documents is not None:
            _take(task, group.documents, group.longest)
    build.build(loaded, request, None)
    raw = harness.run_tasks(lm, loaded, say=say)
    samples = {of: sorted(raw["samples"][task], key=lambda s: s["doc_id"]) for task, of in group.tasks.items()}
    read: dict[str, Callable[[dict[str, Documents]], Part]] = {
        "gold": _gold,
        "traces": _traces,
        "recall": partial(_found, "recall", lm),
        "needles": partial(_found, "needle", lm),
    }
    return read[group.name](samples)


def _take(task: Any, documents: int, longest: int) -> None:
    """Leave the first documents of each length up to the longest to a task."""
    data = task.dataset["test"]
    seen: dict[int, int] = {}
    kept = []
    for number, length in enumerate(data["length"]):
        seen[length] = seen.get(length, 0) + 1
        if length <= longest and seen[length] <= documents:
            kept.append(number)
    task.dataset = {"test": data.select(kept)}


def _gold(samples: dict[str, Documents]) -> Part:
    part = Part()
    for of, rows in samples.items():
        part.add("gold_bits_per_byte", of, None, np.array([row["bits_per_byte"] for row in rows], np.float64))
    return part


def _traces(samples: dict[str, Documents]) -> Part:
    part = Part()
    everything: dict[int, list[np.ndarray]] = {}
    for of, rows in samples.items():
        for length, values in _by_length(rows, "acc"):
            part.add("traces_accuracy", of, length, values)
            everything.setdefault(length, []).append(values)
    for length, of_formats in sorted(everything.items()):
        part.add("traces_accuracy", ALL, length, np.concatenate(of_formats))
    return part


def _found(measure: str, lm: BatchedByTokens, samples: dict[str, Documents]) -> Part:
    """Return the accuracy of generated answers, and the bits per byte of the right ones, of questions about texts."""
    part = Part()
    for of, rows in samples.items():
        pairs = [(row["doc"]["context"], f" {_right(row['doc'])}") for row in rows]
        requests = [
            Instance("loglikelihood", row["doc"], pair, i)
            for i, (row, pair) in enumerate(zip(rows, pairs, strict=True))
        ]
        for row, (_, text), (nats, _) in zip(rows, pairs, lm.loglikelihood(requests), strict=True):
            row["pair"] = (nats, len(text.encode("utf-8")))
        for length, values in _by_length(rows, "contains"):
            part.add(f"{measure}_accuracy", of, length, values)
        for length, values in _by_length(rows, "pair"):
            part.add(f"{measure}_bits_per_byte", of, length, values)
    return part


def _right(doc: dict[str, Any]) -> str:
    """Return the right answer of a question about a text."""
    return doc["answers"][0] if "answers" in doc else doc["answer"]


def _by_length(rows: Documents, key: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each length with the values of its documents, float64 [n] or [n, 2]."""
    for length in sorted({row["doc"]["length"] for row in rows}):
        yield length, np.array([row[key] for row in rows if row["doc"]["length"] == length], np.float64)
