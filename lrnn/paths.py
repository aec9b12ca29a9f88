"""Paths in settings: `~` and `$VARIABLES`, and the folder that a relative path starts at."""

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from lrnn import shipped
from lrnn.errors import UserError
from lrnn.files import expand
from lrnn.parsing import Key

HERE = Path()  # the current folder, at which paths on the command line start


@dataclass(frozen=True)
class IsPath:
    """Marks a key that holds a path, a list of paths, or a mapping whose `base` is a path.

    Attributes:
        holds: a file in the folder that the key names, without which the folder does not count as existing.
        names: a folder of `lrnn.shipped` whose files can be given by name.
        only_if_exists: the key can hold something else too, such as a name on the hub: only what exists is a path.
        never: values that are no path even if such a file exists.
        within: a key beside this one. If it names a folder, this path starts there.
    """

    holds: str = ""
    names: Path | None = None
    only_if_exists: bool = False
    never: frozenset[str] = frozenset()
    within: str = ""


@dataclass(frozen=True)
class FieldsOf:
    """Marks a key that holds a mapping with some fields of another schema, whose paths are paths here too."""

    schema: type[BaseModel]


@dataclass
class _Found:
    """A path in settings: `holder[name]`, which is written at `key`. `base` is the path beside it that it may be in."""

    holder: Any
    name: str | int
    mark: IsPath
    key: Key
    base: str | None = None

    @property
    def text(self) -> str:
        return self.holder[self.name]

    @property
    def is_relative(self) -> bool:
        return not (os.path.isabs(self.text) or "://" in self.text or self.text in self.mark.never)

    def is_within(self, *folders: Path) -> bool:
        """Return whether the path beside it is a folder, at which this one then starts."""
        return self.base is not None and any((folder / self.base).is_dir() for folder in folders)

    def exists(self, folder: Path) -> bool:
        """Return whether the path exists in a folder."""
        return _exists(folder, os.path.join(self.text, self.mark.holds) if self.mark.holds else self.text)


def place(schema: type[BaseModel], values: Any, folder: Path, origin: Callable[[Key], str]) -> str | None:
    """Expand every path in the values of a file, and let relative ones start at its folder. `values` are changed.

    In older versions they started at the current folder. This still holds for a file whose paths exist there, and
    none of them beside the file.

    Args:
        schema: the schema of the values, whose path keys are marked with `IsPath`.
        values: parsed YAML.
        folder: the folder of the file.
        origin: returns where a key was written, for messages.

    Returns:
        A notice if the paths start at the current folder for this reason, otherwise None.

    Raises:
        UserError: an environment variable is not set, a user does not exist, or a path is empty.
    """
    found = list(_paths(schema, values, ()))
    for path in found:
        path.holder[path.name] = expand(path.text, f"{origin(path.key)}: {_dotted(path.key)}")
        if not path.text:
            raise UserError(f"{origin(path.key)}: {_dotted(path.key)} is empty; give a path")
    relative = [path for path in found if path.is_relative and not path.is_within(folder, HERE)]
    here = [path for path in relative if path.exists(HERE)]
    notice = None
    if here and folder.resolve() != HERE.resolve() and not any(path.exists(folder) for path in relative):
        first = here[0]
        notice = (
            f"{origin(first.key)}: {_dotted(first.key)} = {first.text} exists in the current folder, not beside the "
            "file, so the relative paths of this file start at the current folder; write them relative to the file"
        )
        folder = HERE
    for path in relative:
        path.holder[path.name] = _placed(path.text, path.mark, folder)
    return notice


def seen_from(text: str, folder: Path) -> str:
    """Return a path as `folder` sees it: the same from every current folder, and when both are moved together.

    What does not exist, such as a name on the hub, stays as it is.
    """
    if "://" in text or not _exists(HERE, text):
        return text
    return os.path.relpath(os.path.realpath(text), os.path.realpath(folder))


def is_mapping_of(annotation: Any, section: type[BaseModel]) -> bool:
    """Return whether a type is a mapping from names to sections, `dict[str, section]`."""
    return get_origin(annotation) is dict and get_args(annotation)[1] is section


def _paths(schema: type[BaseModel], values: Any, above: Key) -> Iterator[_Found]:
    for name, field in schema.model_fields.items():
        if not isinstance(values, dict) or name not in values:
            continue
        value, key = values[name], (*above, name)
        if (mark := _mark(schema, name)) is not None:
            yield from _texts(values, name, mark, key, _beside(schema, values, mark.within))
        candidates = [field.annotation, *get_args(field.annotation)]
        candidates += [mark.schema for mark in field.metadata if isinstance(mark, FieldsOf)]
        for inner in (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)):
            if isinstance(value, list):
                for number, item in enumerate(value):
                    yield from _paths(inner, item, (*key, number))
            elif isinstance(value, dict) and is_mapping_of(field.annotation, inner):
                for name, item in value.items():
                    yield from _paths(inner, item, (*key, name))
            else:
                yield from _paths(inner, value, key)


def _mark(schema: type[BaseModel], name: str) -> IsPath | None:
    return next((mark for mark in schema.model_fields[name].metadata if isinstance(mark, IsPath)), None)


def _beside(schema: type[BaseModel], values: dict[str, Any], name: str) -> str | None:
    """Return the path at another key of a section, or None if there is none."""
    value = values.get(name) if name else None
    mark = _mark(schema, name) if name else None
    return value if isinstance(value, str) and mark is not None and value not in mark.never else None


def _texts(holder: Any, name: str | int, mark: IsPath, key: Key, base: str | None) -> Iterator[_Found]:
    value = holder[name]
    if isinstance(value, str):
        yield _Found(holder, name, mark, key, base)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, str):
                yield _Found(value, number, mark, (*key, number), base)
    elif isinstance(value, dict) and isinstance(value.get("base"), str):
        yield _Found(value, "base", mark, (*key, "base"))


def _placed(text: str, mark: IsPath, folder: Path) -> str:
    if not _exists(folder, text):
        if mark.names is not None and text in shipped.names(mark.names):
            return str(shipped.find(text, mark.names, "file"))
        if mark.only_if_exists:
            return text
    if folder == HERE:
        return text
    joined = os.path.join(folder, text)
    normal = os.path.normpath(joined)
    # `link/..` is not the folder that holds the link.
    return normal if os.path.realpath(normal) == os.path.realpath(joined) else joined


def _exists(folder: Path, text: str) -> bool:
    path = os.path.join(folder, text)
    return bool(glob.glob(path)) if glob.has_magic(text) else os.path.lexists(path)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))
