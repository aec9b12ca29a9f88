"""Read the description of a model, a Hugging Face `config.json`, strictly."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrnn.errors import UserError
from lrnn.settings import name_hint, read_json

if TYPE_CHECKING:
    from lrnn import LrnnConfig

NOT_OF_THE_MODEL = ("auto_map", "lrnn_training")  # config.json of a saved or exported model also has these


def load_model_config(path: str | Path) -> "LrnnConfig":
    """Read the `config.json` of a model. Raises UserError for unknown fields and bad values."""
    return model_config_from(read_json(path, "model configuration"), f"model configuration {path}")


def model_config_from(raw: dict[str, Any], origin: str) -> "LrnnConfig":
    """Make a model's configuration of the fields of a `config.json`, strictly.

    Raises:
        UserError: another model type, an unknown field, a wrong type or value. The message begins with `origin`.
    """
    from lrnn import LrnnConfig  # here, because it imports transformers and torch

    fields = {name: value for name, value in raw.items() if name not in NOT_OF_THE_MODEL}
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
