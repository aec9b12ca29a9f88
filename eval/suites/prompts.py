"""The tokenizer of a model folder, and what prompts need of it: the length of the context, and the chat template."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lrnn.errors import UserError, first_line


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, without running its code. Raise UserError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of transformers and tokenizers, of any type
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder}: its tokenizer cannot be loaded, or needs code of its own ({reason})") from error


def context_length(folder: Path, tokenizer: Any) -> int:
    """Return the tokens of context that lm-eval would take: of the configuration, of the tokenizer, or 2048."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of the type's own code, of any type
        raise UserError(f"{folder / 'config.json'} cannot be read as a configuration: {first_line(error)}") from error
    return length_of(config, tokenizer)


def length_of(config: Any, tokenizer: Any) -> int:
    """Return the tokens of context of a configuration, see `context_length`."""
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(config, tokenizer) or 2048


def chat_renderer(tokenizer: Any, name: bool | str) -> Callable[..., str] | None:
    """Return lm-eval's function that renders a conversation, or None if no chat template was asked for.

    Args:
        name: True for the tokenizer's own template, or the name of one of several.

    Raises:
        UserError: the tokenizer has no such template.
    """
    if not name:
        return None
    from lm_eval.models.huggingface import HFLM

    render: Any = HFLM.apply_chat_template
    template = {"chat_template": _find_template(tokenizer.chat_template, name)}
    return partial(render, SimpleNamespace(tokenizer=tokenizer, chat_template_args=template))


def _find_template(templates: str | dict[str, str] | None, name: bool | str) -> str:
    if not templates:
        raise UserError("--apply-chat-template: the model's tokenizer has no chat template, as base models have none")
    if isinstance(templates, str):
        if name is not True:
            raise UserError(
                f"--apply-chat-template {name}: the model has one template without a name; leave the name out"
            )
        return templates
    wanted = "default" if name is True else name
    if wanted not in templates:
        raise UserError(f"--apply-chat-template: no template {wanted!r}; the model has {', '.join(sorted(templates))}")
    return templates[wanted]
