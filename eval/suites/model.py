"""lm-eval's Hugging Face model, with one progress bar for the text of all documents, and one bos before each text."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm


class Model(HFLM):
    """Compute what `HFLM` does.

    For whole documents, `HFLM` shows a bar per batch of windows. None of them tells how much is left, and in a log,
    where bars appear after half a minute, none appears at all.

    With `add_bos_token=True` a text begins with one bos, whatever the class of the tokenizer. `HFLM` leaves this to the
    tokenizer, of which only some classes do it, and scores a whole document with two: its own and the tokenizer's.
    """

    add_bos_token: bool | None
    _bar: tqdm | None = None

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of every document in nats, with a bar that counts tokens."""
        with_bos = self.add_bos_token
        self.add_bos_token = False if with_bos else with_bos  # HFLM itself puts bos in front of a whole document
        try:
            total = sum(len(self.tok_encode(text)) for (text,) in (request.args for request in requests))
            with tqdm(total=total, unit="token", unit_scale=True, desc="whole documents, tokens") as self._bar:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._bar, self.add_bos_token = None, with_bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """Return the ids of a text, after bos if `add_bos_token` is true and `add_special_tokens` is not given."""
        if not self.add_bos_token or add_special_tokens is not None:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **options)
        ids = [self.prefix_token_id, *self.tokenizer.encode(string, add_special_tokens=False)]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Any, Any]:
        """Return ids and attention mask of the texts, int64 [B, T], each after bos if `add_bos_token` is true."""
        if not self.add_bos_token:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        rows = [self.tok_encode(string) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        start = -(left_truncate_len or 0)
        return batch["input_ids"][:, start:], batch["attention_mask"][:, start:]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> list[Any]:
        if self._bar is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)
        found = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
        self._bar.update(sum(len(continuation) for _, _, continuation in requests))
        return found
