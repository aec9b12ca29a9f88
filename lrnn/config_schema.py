"""JSON schemas of the configuration files, by which editors complete keys, describe them, and mark mistakes.

They are made from what reads the files: the schemas of runs, grids and ladders, and the signature and docstring of
`LrnnConfig`.
"""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import TypeAdapter

from lrnn.ladder.config import LadderConfig
from lrnn.model.mixers import MIXERS
from lrnn.model.pattern import options_of
from lrnn.model.registry import ALIASES
from lrnn.model_config import described_fields
from lrnn.paths import FieldsOf
from lrnn.pretrain.config import Config
from lrnn.settings import BASE, FileOrFields, Section, Unit
from lrnn.track.grid import GridConfig

RUN, GRID, LADDER, MODEL = KINDS = ("run", "grid", "ladder", "model")
SECTIONS: dict[str, type[Section]] = {RUN: Config, GRID: GridConfig, LADDER: LadderConfig}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema of a run, a grid, a ladder or a model."""
    if kind == MODEL:
        return {"$schema": DIALECT, "title": "lrnn model", **model_schema()}
    section = SECTIONS[kind]
    schema = section.model_json_schema()
    for other in {other for s in sections(section) for other in _fields_of_others(s)}:
        own = other.model_json_schema()
        schema["$defs"] |= own.pop("$defs", {}) | {other.__name__: own}
    in_lists = {item for s in sections(section) for item in _items_of_lists(s)}
    for inner in sections(section):
        found = schema if inner is section else schema["$defs"][inner.__name__]
        _describe(found, inner)
        if inner not in in_lists:
            found.pop("required", None)  # the key may be in a base file
    text = {"type": "string"}
    schema["properties"][BASE] = {
        "anyOf": [text, {"type": "array", "items": text}],
        "description": "A YAML file that this one changes key by key, or several, of which later ones count more. "
        "Paths are relative to this file.",
    }
    return {"$schema": DIALECT, **schema, "title": f"lrnn {kind}"}


def model_schema() -> dict[str, Any]:
    """Return the JSON schema of a model's fields. A file may hold other fields of transformers too."""
    properties: dict[str, dict[str, Any]] = {"model_type": {"const": "lrnn"}}
    for field in described_fields():
        properties[field.name] = TypeAdapter(field.annotation).json_schema() | {"default": field.default}
        if field.meaning:
            properties[field.name]["description"] = field.meaning
    name = {"type": "string", "enum": [*MIXERS, *ALIASES]}
    entries = [name, *(_entry_schema(mixer, properties) for mixer in MIXERS)]
    pattern = {"type": "array", "minItems": 1, "items": {"anyOf": entries}}
    properties["mixer"] = {"anyOf": [name, pattern]} | {
        key: properties["mixer"][key] for key in ("default", "description")
    }
    return {"type": "object", "properties": properties}


def _entry_schema(mixer: str, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of an entry of a pattern with options, for one mixer."""
    names = [mixer, *(alias for alias, name in ALIASES.items() if name == mixer)]
    options = {option: {k: x for k, x in fields[option].items() if k != "default"} for option in options_of(mixer)}
    return {
        "type": "object",
        "properties": {"mixer": {"enum": names}, **options},
        "required": ["mixer"],
        "additionalProperties": False,
    }


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """Yield a section and those in it, each once. One of which a key holds some fields counts as in it."""
    found = {section: None}
    waiting = [section]
    while waiting:
        current = waiting.pop(0)
        yield current
        inner = [s for field in current.model_fields.values() for s in _sections_of(field.annotation)]
        new = [s for s in dict.fromkeys([*inner, *_fields_of_others(current)]) if s not in found]
        found |= dict.fromkeys(new)
        waiting += new


def _fields_of_others(section: type[Section]) -> Iterator[type[Section]]:
    """Yield the sections of which keys of this one hold some fields."""
    for field in section.model_fields.values():
        for mark in field.metadata:
            if isinstance(mark, FieldsOf) and issubclass(mark.schema, Section):
                yield mark.schema


def _sections_of(annotation: Any) -> list[type[Section]]:
    candidates = [annotation, *get_args(annotation)]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]


def _items_of_lists(section: type[Section]) -> Iterator[type[Section]]:
    for field in section.model_fields.values():
        if getattr(field.annotation, "__origin__", None) is list:
            yield from _sections_of(field.annotation)


def _describe(schema: dict[str, Any], section: type[Section]) -> None:
    """Add units to the descriptions of a section's keys, and the fields of a model to a key that may hold them."""
    for name, field in section.model_fields.items():
        entry = schema["properties"][name]
        entry.pop("title", None)
        optional = [fact for a in get_args(field.annotation) for fact in getattr(a, "__metadata__", ())]
        units = [fact.name for fact in [*field.metadata, *optional] if isinstance(fact, Unit)]
        entry["description"] = " ".join((field.description or "").split())
        if units:
            entry["description"] += f" Unit: {units[0]}."
        for mark in field.metadata:
            if isinstance(mark, FieldsOf):
                description, default = entry["description"], entry.get("default")
                entry.clear()
                entry |= {"$ref": f"#/$defs/{mark.schema.__name__}", "description": description}
                entry |= {} if default is None else {"default": default}
        if FileOrFields() in field.metadata:
            fields = model_schema()
            fields["properties"][BASE] = {
                "type": "string",
                "description": "A config.json that the other fields change.",
            }
            entry["anyOf"] = [{"type": "string"}, fields]
