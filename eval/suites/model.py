"""lm-eval's Hugging Face model, with one progress bar for the text of all documents."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm


class Model(HFLM):
    """Compute what `HFLM` does.

    For whole documents, `HFLM` shows a bar per batch of windows. None of them tells how much is left, and in a log,
    where bars appear after half a minute, none appears at all.
    """

    _bar: tqdm | None = None

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of every document in nats, with a bar that counts tokens."""
        total = sum(len(self.tok_encode(text)) for (text,) in (request.args for request in requests))
        with tqdm(total=total, unit="token", unit_scale=True, desc="whole documents, tokens") as self._bar:
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self._bar = None

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> list[Any]:
        if self._bar is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **options)
        found = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
        self._bar.update(sum(len(continuation) for _, _, continuation in requests))
        return found
