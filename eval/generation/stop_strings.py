"""Stop a text at a stop string. The text is decoded every few tokens only, because that is the host's work."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopStrings(StoppingCriteria):
    """Say that a row is finished once its new text contains one of some strings.

    lm-eval's own criterion decodes the last tokens of every row after every token, once per string, and continues until
    all rows have met the same string. What lies behind a stop string is cut off in any case, so that a row may run a
    few tokens beyond it.

    Args:
        tokenizer: decodes the tokens.
        strings: the stop strings.
        prompt_length: number of tokens of the prompt, padding included; they are not looked at.
        every: number of tokens between two looks.
    """

    def __init__(self, tokenizer: Any, strings: list[str], prompt_length: int, every: int):
        self._tokenizer, self._strings = tokenizer, [string for string in strings if string]
        self._every = every
        # A string that began before the last look needs some tokens from before it: as many as it has bytes, because a
        # token has at least one byte.
        self._overlap = max((len(string.encode()) for string in self._strings), default=0)
        self._looked = self._start = prompt_length
        self._done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows are finished, bool [B]."""
        if self._done is None:
            self._done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        length = input_ids.shape[1]
        if length - self._looked >= self._every and self._strings:
            tail = input_ids[:, max(self._looked - self._overlap, self._start) :]
            rows = (~self._done).nonzero()[:, 0].tolist()
            texts = self._tokenizer.batch_decode(tail[rows])
            for row, text in zip(rows, texts, strict=True):
                self._done[row] = any(string in text for string in self._strings)
            self._looked = length
        return self._done
