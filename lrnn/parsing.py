"""Parse YAML and JSON text strictly: a key that is given twice is refused, and the line of every key is known."""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from lrnn.errors import UserError

Key = tuple[str | int, ...]  # the keys and list indices that lead to a value
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?:\s*(:))?|[{}\[\],\n]', re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """A parsed text.

    Attributes:
        value: mappings, lists, texts and numbers. No two places share an object, so each can be changed alone.
        lines: the line of every key and list item, counted from 1.
    """

    value: Any
    lines: dict[Key, int]


class _Loader(yaml.SafeLoader):
    """A safe loader that reads floats as YAML 1.2 does. PyYAML alone reads 3e-4, without a dot, as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, origin: str) -> Parsed:
    """Parse a YAML document.

    Raises:
        UserError: the text is not YAML, gives a key twice, or contains itself. The message begins with `origin`.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Parsed(None, {})
        _check_keys(loader, node, origin, "\n" in text, set(), ())
        value = loader.construct_document(node)
        lines: dict[Key, int] = {}
        # Merged keys (`<<`) are in the nodes only now, after construction.
        return Parsed(_read_lines(loader, node, value, (), lines), lines)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date or number
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())  # PyYAML explains in several lines
        raise UserError(f"{origin} is not YAML: {reason}") from None
    finally:
        loader.dispose()


def parse_json(text: str, origin: str) -> Parsed:
    """Parse a JSON document.

    Raises:
        UserError: the text is not JSON, or gives a key twice. The message begins with `origin`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not JSON: {error}") from None
    return Parsed(value, _json_lines(text, origin))


def _check_keys(
    loader: _Loader, node: yaml.Node, origin: str, number: bool, seen: set[int], above: tuple[int, ...]
) -> None:
    """Raise UserError if a mapping gives a key twice, or if a node contains itself by an alias.

    Args:
        number: messages begin with the number of the line too.
    """

    def place(at: yaml.Node) -> str:
        return f"{origin}:{at.start_mark.line + 1}" if number else origin

    if id(node) in above:
        raise UserError(f"{place(node)}: this value contains itself")
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"{place(key_node)}: key {key!r} should be text; write it in quotes")
            if key in lines:
                first = f", first in line {lines[key]}" if number else ""
                remedy = "write one list, <<: [*first, *second]" if merge else "remove one"
                raise UserError(f"{place(key_node)}: key {key} is given twice{first}; {remedy}")
            lines[key] = key_node.start_mark.line + 1
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value
    for child in children:
        _check_keys(loader, child, origin, number, seen, (*above, id(node)))


def _read_lines(loader: _Loader, node: yaml.Node, value: Any, path: Key, lines: dict[Key, int]) -> Any:
    """Note the line of every key below `path`. Return a copy of the value that shares no object with itself."""
    if isinstance(value, dict):
        nodes = {loader.construct_object(key, deep=True): (key, child) for key, child in node.value}
        copy: Any = {}
        for name, item in value.items():
            key_node, child = nodes[name]
            lines[*path, name] = key_node.start_mark.line + 1
            copy[name] = _read_lines(loader, child, item, (*path, name), lines)
        return copy
    if isinstance(value, list):
        copy = []
        for number, (child, item) in enumerate(zip(node.value, value, strict=True)):
            lines[*path, number] = child.start_mark.line + 1
            copy.append(_read_lines(loader, child, item, (*path, number), lines))
        return copy
    return value


def _json_lines(text: str, origin: str) -> dict[Key, int]:
    """Return the line of every key of a valid JSON document. Raise UserError if a key is given twice."""
    lines: dict[Key, int] = {}
    path: list[str | int] = []  # one entry per open object or array: its current key or index
    line = 1
    for token in JSON_TOKEN.finditer(text):
        word = token[0]
        if word in "{[":
            path.append("" if word == "{" else 0)
        elif word in "}]":
            path.pop()
        elif word == "," and isinstance(path[-1], int):
            path[-1] += 1
        elif token[1]:
            path[-1] = key = json.loads(word[:-1])
            if (*path,) in lines:
                first = lines[*path,]
                raise UserError(f"{origin}:{line}: key {key} is given twice, first in line {first}; remove one")
            lines[*path,] = line
        line += word.count("\n")
    return lines
