"""lm-eval's Hugging Face model as lrnn runs it: no code of a folder, float32 scores, a stated rule for bos, one bar."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, StoppingCriteriaList

from lrnn.errors import UserError
from lrnn.eval.generation.batch_size import free_memory, largest_batch
from lrnn.eval.generation.decoding import GraphDecoding, is_of_lrnn
from lrnn.eval.generation.stop_strings import StopStrings
from lrnn.eval.loading import choose_device, load_model
from lrnn.eval.model_folder import check_export, default_device, says_add_bos
from lrnn.eval.suites.bos import Bos, decide
from lrnn.eval.suites.prompts import load_tokenizer


class Model(HFLM):
    """Compute what `HFLM` does, with the following differences.

    The folder is untrusted: none of its code is run, and nothing is unpickled. Scores are computed in float32.

    A prompt begins with the ids of the rule for bos, once, also if it is too long and cut from the left. `HFLM` leaves
    bos to the tokenizer, of which only some classes add it, looks at the first prompt of a batch only, and cuts it off.
    A whole document is scored behind one bos in any case, as in `HFLM`, which scores a second one if the tokenizer adds
    bos.

    For whole documents, `HFLM` shows a bar per batch of windows. None of them tells how much is left, and in a log,
    where bars appear after half a minute, none appears at all. Here one bar counts tokens.

    Greedy generation of a model of lrnn runs on CUDA graphs, and ends a row at any of its stop strings.

    Prompts with answers to score are tokenised on as many threads as torch has. On one, long prompts with several
    answers take longer than a small model does.
    """

    _bar: tqdm | None = None
    _decoding: GraphDecoding | None = None
    _encoded: dict[tuple[str, str], tuple[list[int], list[int]]] | None = None
    batch_size_per_gpu: int | str

    def __init__(
        self,
        pretrained: str | Path,
        *,
        bos: str = "auto",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load a folder.

        Args:
            pretrained: the folder.
            bos: one of `bos.RULES`.
            device: None for a GPU if there is one.
            dtype: of the weights; None for bfloat16 on a GPU and float32 on a CPU.
            batch_size: sequences per batch, "auto" or "auto:N".
            max_batch_size: the largest batch that "auto" tries.
            max_length: tokens of context; None for what the model's configuration says.
            unknown: other arguments of `HFLM`, which lm-eval's command line may pass.

        Raises:
            UserError: the folder cannot be evaluated, or an argument is unknown.
        """
        if unknown:
            raise UserError(
                f"the model lrnn has no argument {', '.join(unknown)}; it has pretrained, bos, device, dtype, "
                "batch_size, max_batch_size and max_length, and never runs code of a folder; `--model hf` has others"
            )
        folder = Path(pretrained)
        check_export(folder)
        self.bos = decide(bos, load_tokenizer(folder), says_add_bos(folder))
        self._on, self._as_type = choose_device(device, dtype)
        device, dtype = default_device(device, dtype)
        loading: dict[str, Any] = {"trust_remote_code": False, "max_batch_size": max_batch_size}
        self._start(str(folder), batch_size, max_length, device=device, dtype=dtype, **loading)
        self.settings: dict[str, Any] = {"device": device, "dtype": dtype, "batch_size": batch_size}
        self.settings |= {"max_length": self.max_length, "softmax_dtype": "float32"}
        self.settings |= {"bos": self.bos.rule, "bos_ids": list(self.bos.ids)}

    @classmethod
    def around(cls, model: PreTrainedModel, tokenizer: Any, bos: Bos, batch_size: int, max_length: int) -> "Model":
        """Return lm-eval's model of one that is already on its device, which answers as its export would."""
        made = cls.__new__(cls)
        made.bos = bos
        made._start(model, batch_size, max_length, tokenizer=tokenizer)
        return made

    def _start(self, pretrained: Any, batch_size: int | str, max_length: int | None, **options: Any) -> None:
        """Initialize lm-eval's model."""
        super().__init__(
            pretrained=pretrained,
            backend="causal",  # no guess
            softmax_dtype="float32",  # in bfloat16 a log-softmax is quantised to 0.005 nats per token
            batch_size=batch_size,
            max_length=max_length,
            **options,
        )

    def _create_model(self, pretrained: str, **options: Any) -> None:
        """Load the weights. `HFLM` would fill those that are missing with random numbers."""
        self._device = self._on  # `HFLM` takes another one for names that it does not know
        self._model = load_model(Path(pretrained), self._on, self._as_type)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        """Return prompts and generated ids, int64 [B, T]. A model of lrnn decodes greedily on CUDA graphs."""
        asked = any(value for name, value in options.items() if name != "attention_mask")
        if asked or not is_of_lrnn(self.model):
            return super()._model_generate(context=context, max_length=max_length, stop=stop, **options)
        if self._decoding is None:
            self._decoding = GraphDecoding(self.model)
        every = self._decoding.tokens_per_replay
        return self.model.generate(
            input_ids=context,
            attention_mask=options.get("attention_mask"),
            max_length=max_length,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([StopStrings(self.tokenizer, stop, context.shape[1], every)]),
            pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=self._decoding,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated texts. With the batch size "auto", a batch is as large as the memory allows."""
        size = self.batch_size_per_gpu
        if size != "auto" or self.device.type != "cuda" or not is_of_lrnn(self.model):
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        self.batch_size_per_gpu = largest_batch(self.model, free_memory(self.device), self.max_length)
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu = size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every continuation in nats, and whether it is the likeliest."""
        pairs = list(dict.fromkeys(request.args for request in requests if request.args[0]))
        encode = super()._encode_pair
        # The first one alone: it may change settings of the tokenizer, which threads cannot do while others use it.
        first = [encode(*pair) for pair in pairs[:1]]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # they compute without Python's lock
            rest = threads.map(lambda pair: encode(*pair), pairs[1:])
            self._encoded = dict(zip(pairs, [*first, *rest], strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        found = (self._encoded or {}).get((context, continuation))
        return super()._encode_pair(context, continuation) if found is None else found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of every document in nats, with a bar that counts tokens."""
        texts = (text for (text,) in (request.args for request in requests))
        total = sum(len(self.tok_encode(text, add_special_tokens=False)) for text in texts)
        try:
            with tqdm(
                total=total, unit="token", unit_scale=True, desc="whole documents, tokens", disable=disable_tqdm
            ) as self._bar:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._bar = None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Return the ids of a text, behind those of the rule unless `add_special_tokens` is given.

        `HFLM` puts bos in front of a whole document itself.
        """
        if add_special_tokens is not None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if self._bar is not None:
            return ids
        return self._begin(ids, left_truncate_len)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Return ids and attention mask of the texts, int64 [B, T], each behind the ids of the rule."""
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        rows = [row or [self.prefix_token_id] for row in rows]  # there is no generation from nothing
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> list[Any]:
        if self._bar is not None:
            found = _finite(super()._loglikelihood_tokens(requests, disable_tqdm=True, **options))
            self._bar.update(sum(len(continuation) for _, _, continuation in requests))
            return found
        cut = [
            (texts, self._cut(context, len(continuation)), continuation) for texts, context, continuation in requests
        ]
        return _finite(super()._loglikelihood_tokens(cut, disable_tqdm=disable_tqdm, **options))

    def _cut(self, context: list[int], continuation: int) -> list[int]:
        """Return the context, cut behind the ids of the rule if it is too long for a continuation of so many tokens.

        `HFLM` reads the last `max_length + 1` ids without the very last one, and would cut off the beginning.
        """
        first, length = list(self.bos.ids), self.max_length + 1 - continuation
        fits = len(context) <= length or context[: len(first)] != first
        return context if fits else self._begin(context, length)

    def _begin(self, ids: list[int], length: int | None) -> list[int]:
        """Return ids that begin with those of the rule, once. If they exceed a length, the first others are cut."""
        first = list(self.bos.ids)
        rest = ids[len(first) :] if ids[: len(first)] == first else ids
        if length is not None:
            rest = rest[len(rest) - min(len(rest), max(length - len(first), 0)) :]
        return first + rest


def _finite(answers: list[Any]) -> list[Any]:
    """Return answers (nats, is greedy). Raise UserError if one is no number, which would score as a wrong answer."""
    if not all(math.isfinite(nats) for nats, _ in answers):
        raise UserError("the model computes log-likelihoods that are infinite or NaN; it may need --dtype float32")
    return answers
