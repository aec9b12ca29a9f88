"""Read settings against a strict schema: YAML files with `key.sub=value` overrides, and JSON files.

Unknown keys and wrong types are refused with the key's full path.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lrnn.errors import UserError


class Section(BaseModel):
    """A mapping of settings. The string below a field is its entry in the configuration reference."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Unit:
    """The unit of a setting in the configuration reference: `every: Annotated[int, Unit("steps")]`."""

    name: str


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """A safe loader that reads floats as YAML 1.2 does. PyYAML alone reads 3e-4, without a dot, as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(
    schema: type[S],
    path: str | Path,
    overrides: Sequence[str] = (),
    convert: Callable[[dict, str], dict] = lambda raw, origin: raw,
) -> S:
    """Read a YAML file of a schema and apply `key.sub=value` overrides (values are YAML).

    Args:
        convert: turns what older versions wrote, given with the file's path, into what the schema describes.

    Raises:
        UserError: the file is missing or not a YAML mapping, an override has no `=`, a key is unknown, a value has the
            wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"configuration {path} does not exist; give the path of a YAML file such as configs/tiny.yaml")
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"configuration {path} is not UTF-8 text: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"configuration {path} is not a mapping of keys to values")
    for override in overrides:
        key, sep, value = override.partition("=")
        if not (key and sep):
            raise UserError(f"override {override!r} should look like key.sub=value")
        _assign(raw, key, _parse_yaml(value, f"override {override}: the value"))
    return validate(convert(raw, str(path)), str(path), schema)


def validate(raw: dict, origin: str, schema: type[S]) -> S:
    """Check a parsed configuration against its schema. Raises UserError that names each bad key."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e, origin, schema) for e in error.errors())) from None


def dump(config: Section) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def read_json(path: str | Path, what: str) -> dict:
    """Read a JSON object from a file. Raises UserError that names `what` if that fails."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} should hold a JSON object, not {type(value).__name__}")
    return value


def name_hint(name: str, valid: Sequence[str], *, list_all: bool = False) -> str:
    """Return a hint for a message about an unknown name.

    It names the nearest valid name, and lists all of them if none is near or `list_all` is true.
    """
    near = difflib.get_close_matches(name, valid, n=1)
    guess = [f"did you mean {near[0]}?"] if near else []
    listing = [f"valid: {', '.join(valid) or 'none'}"] if list_all or not near else []
    return " ".join(guess + listing)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())  # PyYAML explains in several lines
        raise UserError(f"{origin} is not YAML: {reason}") from None


def _assign(raw: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise UserError(f"override {key}: {parent} holds a value, not a section")
    raw[last] = value


def _explain(error: Any, origin: str, schema: type[BaseModel]) -> str:
    path = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        names = list(_section_at(schema, error["loc"][:-1]).model_fields)
        return f"{origin}: unknown key {path}; {name_hint(str(error['loc'][-1]), names)}"
    if error["type"] == "missing":
        return f"{origin}: key {path} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    where = f"key {path} = {error['input']!r}: " if path else ""
    return f"{origin}: {where}{message}"


def _section_at(schema: type[BaseModel], loc: tuple) -> type[BaseModel]:
    section: Any = schema
    for name in loc:
        if isinstance(name, int):
            continue
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section
