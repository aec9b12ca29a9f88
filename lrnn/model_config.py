"""Read the description of a model, a Hugging Face `config.json`, strictly."""

import inspect
from pathlib import Path
from typing import Any

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.settings import name_hint, read_json


def load_model_config(path: str | Path) -> LrnnConfig:
    """The model described by a Hugging Face `config.json`. Raises UserError for unknown fields and bad values."""
    return model_config_from(read_json(path, "model configuration"), f"model configuration {path}")


def model_config_from(raw: dict[str, Any], origin: str) -> LrnnConfig:
    """The model described by the fields of a `config.json`, strictly. Raises UserError that begins with `origin`."""
    fields = dict(raw)
    kind = fields.pop("model_type", LrnnConfig.model_type)
    if kind != LrnnConfig.model_type:
        raise UserError(f"{origin}: model_type {kind!r} should be {LrnnConfig.model_type!r}")
    types = inspect.get_annotations(LrnnConfig.__init__)
    known = LrnnConfig().to_dict()
    for name, value in fields.items():
        if name not in known:
            hint = name_hint(name, list(types))
            raise UserError(f"{origin}: unknown field {name}; {hint}")
        # transformers checks no types: the string "false" would be true.
        kind = types.get(name)
        if kind in (bool, int, float) and type(value) not in ((int, float) if kind is float else (kind,)):
            raise UserError(f"{origin}: {name} = {value!r} should be {kind.__name__}")
    try:
        return LrnnConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin}: {error}") from None
