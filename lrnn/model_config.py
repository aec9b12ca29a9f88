"""Read the description of a model, a Hugging Face `config.json`, strictly."""

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrnn.errors import UserError
from lrnn.settings import name_hint, read_json

if TYPE_CHECKING:
    from lrnn import LrnnConfig

# Fields whose None means the value of another.
SAME_AS = {
    "num_value_heads": "num_heads",
    "head_v_dim": "head_dim",
    "num_kv_heads": "num_heads",
    "gated_norm_eps": "norm_eps",
}
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
    known = every_field(LrnnConfig())
    for name, value in fields.items():
        if name not in known:
            hint = name_hint(name, list(types))
            raise UserError(f"{origin}: unknown field {name}; {hint}")
        _check_type(value, types.get(name), f"{origin}: {name}")
    for i, entry in enumerate(fields["mixer"] if isinstance(fields.get("mixer"), list) else []):
        for name, value in entry.items() if isinstance(entry, dict) else ():
            _check_type(value, types.get(str(name)), f"{origin}: mixer[{i}].{name}")
    try:
        return LrnnConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{origin}: {error}") from None


def check_changes_count(config: "LrnnConfig", changes: Iterable[str]) -> None:
    """Raise UserError for a changed field of a model that each layer that reads it has its own value of."""
    from lrnn.model.pattern import options_of  # here, because it imports torch

    layers = [layer for layer, _ in config.kinds_of_layers()]
    for name in changes:
        readers = [layer for layer in layers if name in options_of(layer.mixer)]
        value = getattr(config, name, None)
        if readers and all(getattr(layer, name) != value for layer in readers):
            raise UserError(
                f"model.{name} = {value!r} has no effect: in the model's mixer every layer that reads it, "
                f"{readers[0].mixer}, has its own value, {getattr(readers[0], name)!r}; change it there"
            )


def every_field(config: "LrnnConfig") -> dict[str, Any]:
    """Return the fields of a model, with the options that its `config.json` leaves out at their default."""
    from lrnn.model.configuration_lrnn import OPTIONS  # here, because it imports transformers

    return OPTIONS | config.to_dict()


def _check_type(value: Any, kind: Any, what: str) -> None:
    """Raise UserError for a value of another type, or one that is not finite.

    transformers checks none: the string "false" would be true.
    """
    if kind in (bool, int, float) and type(value) not in ((int, float) if kind is float else (kind,)):
        raise UserError(f"{what} = {value!r} should be {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{what} = {value!r} should be a finite number")


@dataclass(frozen=True)
class ModelField:
    """A field of a model's `config.json`, as the signature and the docstring of `LrnnConfig` describe it."""

    name: str
    annotation: Any
    default: Any
    meaning: str  # empty if the docstring leaves it out


def described_fields() -> list[ModelField]:
    """Return the fields that lrnn reads, in the order of `LrnnConfig`."""
    from lrnn import LrnnConfig  # here, because it imports transformers and torch

    meanings = dict(_arguments_of(inspect.getdoc(LrnnConfig) or ""))
    parameters = inspect.signature(LrnnConfig.__init__).parameters.values()
    return [
        ModelField(p.name, p.annotation, p.default, meanings.get(p.name, ""))
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]


def _arguments_of(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield (name, meaning) of each entry in the Args section of a docstring; `a, b: ...` describes two."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else []:
        names, _, meaning = entry.strip().partition(": ")
        for name in names.split(", "):
            yield name, " ".join(meaning.split())
