"""The tokenizer and the context of the model that prompts are made for, from what lm-eval passes to a data set."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.suites import prompts

load_tokenizer = cache(prompts.load_tokenizer)


def tokenizer_of(metadata: dict[str, Any]) -> Any:
    """Return the tokenizer of the folder `tokenizer` or `pretrained`. Raise UserError if neither is given."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise UserError(
            "prompts of a given number of tokens need a tokenizer: pretrained=DIR in --model_args, or --metadata "
            '\'{"tokenizer": "DIR"}\''
        )
    return load_tokenizer(Path(name))


def counter(metadata: dict[str, Any]) -> Callable[[str], int]:
    """Return a function from a text to its number of tokens, without bos."""
    tokenizer = tokenizer_of(metadata)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def context_length(metadata: dict[str, Any]) -> int:
    """Return `max_length`, or else the context of the model `pretrained`. Raise UserError if neither is given."""
    if metadata.get("max_length"):
        return int(metadata["max_length"])
    if not isinstance(metadata.get("pretrained"), str):
        raise UserError("prompts that fill a context need its length: max_length=N or pretrained=DIR in --model_args")
    return prompts.context_length(Path(metadata["pretrained"]), tokenizer_of(metadata))
