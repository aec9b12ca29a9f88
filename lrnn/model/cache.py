"""The cache of generation. Copied into exported folders."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class LrnnCacheLayer(CacheLayerMixin):
    """The state that one layer carries from token to token, in the form of a layer of transformers' caches.

    Its size does not depend on the number of tokens read, except for attention without a window (`key_values.py`). It
    cannot be cropped, because a recurrence cannot be undone.

    Attributes:
        conv: the last inputs of the layer's convolutions [B, taps - 1, channels], or None.
        state: None, a tensor or a tuple of tensors, batch first. Recurrent states are float32.
        seen_tokens: number of tokens read so far, padding included.
    """

    supports_early_init = False
    # Whether it gives the state ahead of the tokens even after it was given that behind them, as a layer that is
    # computed twice needs it. Only then may documents be packed: the first of each row continues from the state.
    keeps_both_states = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.conv: Tensor | None = None
        self.state: Any = None
        self.seen_tokens = 0

    @property
    def batch_size(self) -> int:
        """Return the number of sequences, or -1 ahead of the first token."""
        state = self.state[0] if isinstance(self.state, tuple) else self.state
        return -1 if state is None else state.shape[0]

    def get_seq_length(self, *args: Any) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no limit

    def get_max_cache_shape(self) -> int:  # the name of `get_max_length` in transformers 4
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._apply(lambda x: x[indices.to(x.device)])

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("a recurrent state cannot be rolled back, so its cache cannot be cropped")

    def lazy_initialization(self, *args: Any) -> None:
        raise NotImplementedError("a layer of lrnn sets its own state; it has no keys and values")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a layer of lrnn sets its own state; it has no keys and values")

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        self.conv = None if self.conv is None else function(self.conv)
        if isinstance(self.state, tuple):
            self.state = tuple(function(x) for x in self.state)
        elif self.state is not None:
            self.state = function(self.state)


class LrnnCache(Cache):
    """The state that generation carries from token to token: an `LrnnCacheLayer` per layer of the model."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[LrnnCacheLayer() for _ in range(num_layers)])


def layers_of(cache: Any, num_layers: int, batch_size: int) -> list[LrnnCacheLayer]:
    """Return the layers of a cache that a caller passed.

    An empty `DynamicCache` is given layers of lrnn, so that a caller who keeps it finds the state in it.

    Raises:
        ValueError: the cache is of another kind, or belongs to another model or batch.
    """
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a cache that this model returned, or None; got a {_name(cache)}")
    if _is_empty_dynamic_cache(cache):
        cache.layers = [LrnnCacheLayer() for _ in range(num_layers)]
        cache.layer_class_to_replicate = None
    layers = cache.layers
    if not all(isinstance(layer, LrnnCacheLayer) for layer in layers):
        raise ValueError(
            f"past_key_values is a {_name(cache)}, which holds keys and values and not the state of a linear RNN; pass "
            "None, an empty DynamicCache(), or a cache that this model returned"
        )
    if len(layers) != num_layers:
        raise ValueError(f"past_key_values has {len(layers)} layers, the model has {num_layers}")
    for layer in layers:
        if layer.batch_size not in (-1, batch_size):
            raise ValueError(
                f"past_key_values holds the state of {layer.batch_size} sequences, the input has {batch_size}"
            )
    return layers


def _is_empty_dynamic_cache(cache: Cache) -> bool:
    """Return whether `cache` is a `DynamicCache` without content, which keeps its layers where they are computed."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return all(
        not isinstance(layer, LrnnCacheLayer) and getattr(layer, "is_initialized", None) is False
        for layer in cache.layers
    )


def _name(cache: Any) -> str:
    return type(cache).__qualname__
