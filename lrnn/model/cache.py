"""The cache of generation. Copied into exported folders."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class LrnnCache(Cache):
    """The state that generation carries from token to token: each layer's mixer state and last inputs.

    Except for the Transformer's, its size does not depend on the number of tokens read. It cannot be cropped, because a
    recurrence cannot be undone.

    Attributes:
        conv: for each layer the last inputs of its convolutions [B, taps - 1, channels], or None.
        state: for each layer None, a tensor or a tuple of tensors, batch first. Recurrent states are float32.
        seen_tokens: number of tokens read so far.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        self.layers: list = []  # this and the next two are read by transformers' Cache
        self.layer_class_to_replicate = None
        self.offloading = False
        self._clear(num_layers)

    def _clear(self, num_layers: int) -> None:
        self.conv: list[Tensor | None] = [None] * num_layers
        self.state: list[Any] = [None] * num_layers
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.state)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def reset(self) -> None:
        self._clear(len(self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices])

    def crop(self, *args, **kwargs) -> None:
        raise NotImplementedError("a recurrent state cannot be rolled back, so its cache cannot be cropped")

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.conv = [None if x is None else function(x) for x in self.conv]
        self.state = [
            tuple(function(y) for y in x) if isinstance(x, tuple) else None if x is None else function(x)
            for x in self.state
        ]
