"""Arguments that transformers renames from version to version. Copied into exported folders."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def accepts_cache(forward: Callable) -> Callable:
    """Let a model's forward method be called with `cache`, as transformers 5.24 and later call `past_key_values`."""

    @wraps(forward)
    def call(self, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("cache and past_key_values are names of the same argument; pass one of them")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    # `generate` looks in the signature for what a caller may pass. The last parameter is **kwargs.
    signature = inspect.signature(forward)
    *parameters, others = signature.parameters.values()
    cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    call.__signature__ = signature.replace(parameters=[*parameters, cache, others])  # type: ignore[attr-defined]
    return call
