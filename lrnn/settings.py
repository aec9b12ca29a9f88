"""Read settings against a strict schema: YAML files with `base:` and `key.sub=value` overrides, and JSON files.

Unknown keys, wrong types and keys that are given twice are refused with the key's full path and its line.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lrnn import paths, shipped
from lrnn.errors import UserError
from lrnn.files import expand
from lrnn.parsing import Key, Parsed, parse_json, parse_yaml

BASE = "base"  # the key that names the file, or the files, that a mapping changes
COMMAND_LINE = "command line"


class Section(BaseModel):
    """A mapping of settings. The string below a field is its entry in the configuration reference."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    named: ClassVar[Path | None] = None  # folder of `lrnn.shipped` whose files can be given by name instead of a path


@dataclass(frozen=True)
class Unit:
    """The unit of a setting in the configuration reference: `every: Annotated[int, Unit("steps")]`."""

    name: str


@dataclass(frozen=True)
class FileOrFields:
    """Marks a key that holds the path of a JSON file, a mapping of its fields, or a mapping with `base` and changes.

    `key: FILE` is short for `key: {base: FILE}`, so that `key.field=value` changes one field of the file.
    """


S = TypeVar("S", bound=Section)


@dataclass
class Settings:
    """The values of a YAML file, its base files and the command line, before they are checked against a schema.

    Attributes:
        path: the file that was asked for.
        schema: what the values should be; says which of them are paths.
        values: the values.
        origins: where each key and list item was written: "FILE:LINE" or "command line".
        notices: what the user should know about the files.
    """

    path: Path
    schema: type[Section]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def files_or_fields(self) -> list[str]:
        """Return the keys that are marked with `FileOrFields`."""
        return [name for name, field in self.schema.model_fields.items() if FileOrFields() in field.metadata]

    def lay(self, parsed: Parsed, file: Path) -> None:
        """Lay the content of a file over the values so far: mappings are merged, everything else is replaced."""
        for name in self.files_or_fields:
            if isinstance(parsed.value.get(name), dict):
                self._lengthen(name)
        self._merge(self.values, parsed.value, (), lambda key: f"{file}:{parsed.lines[key]}")

    def override(self, text: str) -> None:
        """Replace one value, given as `key.sub=value`. Raises UserError if the text does not say how."""
        name, sep, value = text.partition("=")
        path = tuple(name.split("."))
        if not (name and sep):
            raise UserError(f"override {text!r} should look like key.sub=value")
        if path[0] == BASE:
            raise UserError(f"override {text}: base is a key of files; name that file as the configuration instead")
        if len(path) > 1 and path[0] in self.files_or_fields:
            self._lengthen(path[0])
        target = self.values
        for depth, parent in enumerate(path[:-1], 1):
            if target.get(parent) is None:
                target[parent] = {}
                self.origins[path[:depth]] = COMMAND_LINE
            target = target[parent]
            if not isinstance(target, dict):
                raise UserError(f"override {name}: {parent} holds a value, not a section")
        changed: Any = parse_yaml(value, f"override {text}: the value").value
        for part in reversed(path):
            changed = {part: changed}
        paths.place(self.schema, changed, paths.HERE, lambda key: "command line")
        for part in path:
            changed = changed[part]
        self._replace(target, path, changed, lambda key: COMMAND_LINE)

    def origin(self, key: Key) -> str | None:
        """Return where a key, or else the nearest section or list around it, was written; None if nowhere."""
        return next((self.origins[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.origins), None)

    def _lengthen(self, name: str) -> None:
        """Turn `key: FILE` into `key: {base: FILE}`."""
        if isinstance(self.values.get(name), str):
            self.values[name] = {BASE: self.values[name]}
            self.origins[name, BASE] = self.origins[name,]

    def _merge(self, target: dict[str, Any], layer: dict[str, Any], path: Key, said: Callable[[Key], str]) -> None:
        for name, value in layer.items():
            key = (*path, name)
            if isinstance(value, dict) and isinstance(target.get(name), dict):
                self.origins[key] = said(key)
                self._merge(target[name], value, key, said)
            else:
                self._replace(target, key, value, said)

    def _replace(self, target: dict[str, Any], path: Key, value: Any, said: Callable[[Key], str]) -> None:
        self.origins = {key: origin for key, origin in self.origins.items() if key[: len(path)] != path}
        target[str(path[-1])] = value
        self.origins |= {key: said(key) for key in _keys(value, path)}


def load(
    schema: type[S],
    path: str | Path,
    overrides: Sequence[str] = (),
    convert: Callable[[dict, str], dict] = lambda raw, origin: raw,
    notice: Callable[[str], None] = lambda text: print(f"lrnn: notice: {text}", file=sys.stderr),
) -> S:
    """Read a YAML file of a schema and apply `key.sub=value` overrides (values are YAML).

    Args:
        path: the file, or the name of one that comes with lrnn.
        convert: turns what older versions wrote, given with the file's path, into what the schema describes.
        notice: is called with what the user should know about the files.

    Raises:
        UserError: the file or a base is missing or not a YAML mapping, an override has no `=`, a key is unknown or
            given twice, a value has the wrong type.
    """
    settings = resolve(schema, path, overrides)
    for text in settings.notices:
        notice(text)
    return validate(convert(settings.values, str(path)), str(path), schema, settings.origin)


def resolve(schema: type[Section], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, the files that its `base` names and the overrides. Raises UserError; see `load`.

    A file changes its bases key by key. Of several bases, a later one changes the earlier ones. The paths in a file,
    that of a base among them, are relative to the file. A file that comes with lrnn counts as one in the folder of the
    file whose base it is, or in the current folder. Paths in overrides are relative to the current folder.
    """
    settings = Settings(shipped.find(path, schema.named, "configuration"), schema)
    _lay_file(settings, settings.path, (), paths.HERE)
    for override in overrides:
        settings.override(override)
    return settings


def validate(raw: dict, origin: str, schema: type[S], origin_of: Callable[[Key], str | None] = lambda key: None) -> S:
    """Check a parsed configuration against its schema.

    Args:
        origin: the file, for messages.
        origin_of: returns where a key was written, if that is known more exactly.

    Raises:
        UserError: names each bad key.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        reasons: dict[str, list[str]] = {}
        for e in error.errors():
            where, reason = _explain(e, raw, origin, schema, origin_of)
            reasons.setdefault(where, []).append(reason)
        raise UserError("; ".join(where + " or ".join(found) for where, found in reasons.items())) from None


def dump(config: Section) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def read_json(path: str | Path, what: str) -> dict:
    """Read a JSON object from a file. Raises UserError that names `what` if that fails."""
    return parse_json_file(path, what).value


def parse_json_file(path: str | Path, what: str) -> Parsed:
    """Read a JSON object, and the line of each of its keys. Raises UserError that names `what` if that fails."""
    parsed = parse_json(_read_text(Path(path), what), f"{what} {path}")
    if not isinstance(parsed.value, dict):
        raise UserError(f"{what} {path} should hold a JSON object, not {type(parsed.value).__name__}")
    return parsed


def name_hint(name: str, valid: Sequence[str], *, list_all: bool = False) -> str:
    """Return a hint for a message about an unknown name.

    It names the nearest valid name, and lists all of them if none is near or `list_all` is true.
    """
    near = difflib.get_close_matches(name, valid, n=1)
    guess = [f"did you mean {near[0]}?"] if near else []
    listing = [f"valid: {', '.join(valid) or 'none'}"] if list_all or not near else []
    return " ".join(guess + listing)


def _lay_file(settings: Settings, path: Path, above: tuple[Path, ...], user: Path, named_by: str = "") -> None:
    """Lay the bases of a file, then the file itself, over the settings.

    Args:
        above: the files that lead here by their `base`.
        user: the folder at which relative paths start if the file comes with lrnn.
        named_by: says which file and line named this one.
    """
    parsed = parse_yaml(_read_text(path, f"{named_by}configuration"), str(path))
    if not isinstance(parsed.value, dict):
        raise UserError(f"configuration {path} is not a mapping of keys to values")
    chain = (*above, path)
    folder = user if shipped.is_shipped(path) else path.parent
    if BASE in parsed.value:
        line = f"{path}:{parsed.lines[BASE,]}"
        for name in _bases(parsed.value.pop(BASE), line):
            base = path.parent / expand(name, f"{line}: base")
            if not base.exists() and name in shipped.names(settings.schema.named):
                base = shipped.find(name, settings.schema.named, "base")
            if base.resolve() in [file.resolve() for file in chain]:
                circle = " -> ".join(str(file) for file in (*chain, base))
                raise UserError(f"{line}: base {name} leads back to itself: {circle}")
            _lay_file(settings, base, chain, folder, f"{line}: base ")
    notice = paths.place(settings.schema, parsed.value, folder, lambda key: f"{path}:{parsed.lines[key]}")
    settings.notices += [notice] if notice else []
    settings.lay(parsed, path)


def _bases(value: Any, line: str) -> list[str]:
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in bases):
        raise UserError(f"{line}: base = {value!r} should be the path of a YAML file, or a list of such paths")
    return bases


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text: {error}") from None


def _keys(value: Any, path: Key) -> Iterator[Key]:
    """Yield the path of a value and of everything in it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _keys(item, (*path, name))


def _explain(
    error: Any, raw: dict, origin: str, schema: type[BaseModel], origin_of: Callable[[Key], str | None]
) -> tuple[str, str]:
    """Return where an error of pydantic is, and what is wrong there."""
    if error["type"] == "extra_forbidden":
        loc = error["loc"]
        names = list(_section_at(schema, loc[:-1]).model_fields)
        hint = name_hint(str(loc[-1]), names)
        return f"{origin_of(loc) or origin}: unknown key {'.'.join(map(str, loc))}; {hint}", ""
    if error["type"] == "missing":
        return f"{origin}: key {'.'.join(map(str, error['loc']))} is missing", ""
    loc = _in_values(error["loc"], raw)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    key = f"key {'.'.join(map(str, loc))} = {error['input']!r}: " if loc else ""
    return f"{origin_of(loc) or origin}: {key}", message


def _in_values(loc: Key, raw: Any) -> Key:
    """Return the part of an error's location that leads to a value; names of the types of a union may follow."""
    for depth, name in enumerate(loc):
        try:
            raw = raw[name]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _section_at(schema: type[BaseModel], loc: tuple) -> type[BaseModel]:
    section: Any = schema
    is_name = False  # of a section in a mapping of sections
    for name in loc:
        if isinstance(name, int) or is_name:
            is_name = False
            continue
        annotation = section.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
        is_name = paths.is_mapping_of(annotation, section)
    return section
