"""A model of lm-eval that answers requests in chunks, on one device or several, and keeps the answers of an evaluation.

Chunks depend on the requests and the batch size alone. So the answers have the same bits whatever the number of equal
devices, and after an interruption, unless the batch size is chosen by the memory that is free.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from lrnn.errors import UserError
from lrnn.eval.suites.kept_answers import KeptAnswers
from lrnn.eval.suites.model import Model
from lrnn.threads import usable_cores

LEAST = 64  # requests per chunk, but for whole documents, of which a chunk has one batch
GENERATED = 1024  # requests per chunk if the batch size is chosen by memory, which holds as many at most


class ChunkedModel(LM):
    """Answer requests as a `Model` does, in chunks of requests of similar length.

    Args:
        model: answers on its own device, in this process.
        helpers: a process for each further device.
        kept: answers of earlier chunks, which are not computed again; None if there are none, and none are to be kept.
        quiet: whether there is no bar.
    """

    def __init__(self, model: Model, helpers: list["Helper"], kept: KeptAnswers | None, quiet: bool = False):
        super().__init__()
        self._model, self._helpers, self._kept, self._quiet = model, helpers, kept, quiet
        self._calls = 0

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer_name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._model.chat_template(chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._model.apply_chat_template(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._answer("generate_until", requests, disable_tqdm)

    def _answer(self, kind: str, requests: list[Any], quiet: bool) -> list[Any]:
        self._calls += 1
        arguments = [request.args for request in requests]
        chunks = make_chunks(kind, arguments, self._model.batch_size_per_gpu)
        answers: list[Any] = [None] * len(requests)
        waiting: deque[Any] = deque()
        quiet = quiet or self._quiet
        with tqdm(total=len(requests), unit="request", desc=kind.replace("_", " "), disable=quiet) as bar:
            for number, chunk in enumerate(chunks):
                texts = [arguments[i] for i in chunk]
                key = f"{self._calls}:{number}:{_digest(kind, texts)}"
                known = None if self._kept is None else self._kept.get(key)
                if known is None:
                    waiting.append((key, chunk, kind, texts))
                else:
                    _put(answers, chunk, known)
                    bar.update(len(chunk))
            for key, chunk, found in self._compute(waiting):
                if self._kept is not None:
                    self._kept.add(key, found)
                _put(answers, chunk, found)
                bar.update(len(chunk))
        return answers

    def _compute(self, waiting: deque[Any]) -> Iterator[tuple[str, list[int], list[Any]]]:
        """Yield each chunk with its answers, as they come. This process takes part, so that its device is used too."""
        running: dict[Future, tuple[Helper, str, list[int]]] = {}
        while waiting or running:
            busy = [helper for helper, _, _ in running.values()]
            for helper in self._helpers:
                if len(waiting) > 1 and helper not in busy:  # the last chunk is for this process, which is ready
                    key, chunk, *call = waiting.popleft()
                    running[helper.submit(*call)] = helper, key, chunk
            if waiting:
                key, chunk, *call = waiting.popleft()
                yield key, chunk, answer(self._model, *call)
            else:
                wait(running, return_when=FIRST_COMPLETED)
            for future in [future for future in running if future.done()]:
                helper, key, chunk = running.pop(future)
                yield key, chunk, helper.result(future)


def make_chunks(kind: str, arguments: list[tuple], batch_size: int | str) -> list[list[int]]:
    """Return the numbers of the requests of each chunk: those of one generation setting, from long to short.

    Args:
        kind: of the requests.
        arguments: of each request; the first is its text.
        batch_size: a chunk holds whole batches of it, or 64 or more requests if it is chosen by memory.
    """
    if isinstance(batch_size, int):
        size = batch_size if kind == "loglikelihood_rolling" else batch_size * -(-LEAST // batch_size)
    else:
        size = GENERATED if kind == "generate_until" else LEAST
    groups: dict[str, list[int]] = {}
    for i, (_, *rest) in enumerate(arguments):
        groups.setdefault(json.dumps(rest[0], sort_keys=True) if kind == "generate_until" else "", []).append(i)
    chunks = []
    for numbers in groups.values():
        # Requests with one context are neighbours, because `HFLM` computes such a context once.
        numbers = sorted(numbers, key=lambda i: (-len(arguments[i][0]), str(arguments[i][0]), i))
        chunks += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return chunks


def answer(model: Model, kind: str, texts: list[tuple]) -> list[Any]:
    """Return the model's answers to one chunk."""
    requests = [Instance(kind, {}, arguments, i) for i, arguments in enumerate(texts)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def _put(answers: list[Any], chunk: list[int], found: list[Any]) -> None:
    for i, value in zip(chunk, found, strict=True):
        answers[i] = value


def _digest(kind: str, texts: list[tuple]) -> str:
    return hashlib.sha256(json.dumps([kind, texts], sort_keys=True).encode()).hexdigest()


class Helper:
    """A process with the same model on another device.

    Args:
        folder: of the model.
        options: keyword arguments of `Model`, with the device of this process.
        processes: number of processes of the evaluation, which share the cores.
    """

    def __init__(self, folder: Path, options: dict[str, Any], processes: int):
        self._device = options["device"]
        # A process that has used CUDA cannot be forked.
        self._executor = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(folder, options, processes)
        )

    def submit(self, kind: str, texts: list[tuple]) -> Future:
        return self._executor.submit(_answer_here, kind, texts)

    def result(self, future: Future) -> list[Any]:
        """Return the answers. Raise UserError if the process has died."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that evaluated on {self._device} has died, perhaps for lack of memory; the answers so "
                "far are kept: run the same command again, with a smaller --batch-size or --num-processes"
            ) from None

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def share_cores(processes: int) -> None:
    """Let this process compute with its share of the cores."""
    torch.set_num_threads(max(1, usable_cores() // processes))


_model: Callable[[], Model] | None = None  # that of a helper's process


def _prepare(folder: Path, options: dict[str, Any], processes: int) -> None:
    """Let this process answer.

    The model is loaded with the first answer. An error of this function would only be known as a process that died.
    """
    global _model
    share_cores(processes)
    _model = cache(lambda: Model(folder, **options))


def _answer_here(kind: str, texts: list[tuple]) -> list[Any]:
    assert _model is not None
    return answer(_model(), kind, texts)
