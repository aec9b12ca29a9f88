"""What one rank answers while a run is evaluated: chunks of lm-eval's requests, and prompts to continue."""

from functools import cached_property
from typing import Any

from lrnn import LrnnForCausalLM
from lrnn.eval.generation.decoding import GraphDecoding
from lrnn.eval.in_run.crew import Job
from lrnn.eval.in_run.prompts import encode, write_on
from lrnn.eval.suites.bos import Bos
from lrnn.pretrain.config import Config

SAMPLE = "sample"  # the kind of a job that continues a prompt; other kinds are those of lm-eval's requests


class Answers:
    """Answer jobs with a model.

    Args:
        model: on this rank's device.
        tokenizer: as transformers reads it from an export.
        bos: ids that a prompt begins with.
        config: the run's configuration; `eval`, `samples` and `seed` are used.
        prompts: the prompts that samples continue.
        step: step of the weights.
    """

    def __init__(self, model: LrnnForCausalLM, tokenizer: Any, bos: Bos, config: Config, prompts: list[str], step: int):
        self._model, self._tokenizer, self._bos = model, tokenizer, bos
        self._config, self._prompts, self._step = config, prompts, step

    @cached_property
    def lm(self) -> Any:
        """Return lm-eval's model."""
        from lrnn.eval.suites.model import Model  # here, because samples do without lm-eval
        from lrnn.eval.suites.prompts import length_of

        settings = self._config.eval
        max_length = settings.max_length or length_of(self._model.config, self._tokenizer)
        return Model.around(self._model, self._tokenizer, self._bos, settings.batch_size, max_length)

    @cached_property
    def decoding(self) -> GraphDecoding:
        """Return what generates greedily, with CUDA graphs that all prompts share."""
        return GraphDecoding(self._model)

    def __call__(self, job: Job) -> list[Any]:
        """Return the answers to a job."""
        kind, texts = job
        if kind == SAMPLE:
            return [self._continue(number) for number in texts]
        from lrnn.eval.suites.chunked import answer

        return answer(self.lm, kind, texts)

    def _continue(self, number: int) -> str:
        """Return what the model writes after a prompt."""
        ids = encode(self._tokenizer, self._prompts[number], self._bos.ids)
        seed = (self._config.seed, self._step, number)
        return write_on(self._model, self.decoding, self._tokenizer, ids, self._config.samples, seed)
