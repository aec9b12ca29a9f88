"""Rows of a JSON file: a value per line, or one value in the whole file."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from lrnn.pretrain.corpus.rows import BadFile, BadRow, Row, check_escaped, check_value, no_column

SPACE = " \t\r\n"
BOM = "\ufeff"


def json_rows(lines: Iterator[tuple[int, bytes, int | None]], column: str, first: int) -> Iterator[Row]:
    """Yield the rows of a JSON file from row `first` on.

    A file whose first line is `{`, or begins with `[`, is an array of rows, or objects over several lines. Any
    other is JSON lines, and the number of a row is that of its line.

    Args:
        lines: (number, line, byte at which it begins) of the file's lines. If the first is not line 0, the file is
            taken as JSON lines.
        column: the column with the text; without any, a row may be the text itself if the column is "text".
        first: number of the first row.
    """
    begin: list[tuple[int, bytes, int | None]] = []
    for numbered in lines:
        begin.append(numbered)
        if stripped := numbered[1].strip():
            if begin[0][0] == 0 and (stripped == b"{" or stripped.startswith(b"[")):
                whole = b"".join(line for _, line, _ in chain(begin, lines))
                yield from _rows_of_whole(*_decoded(whole), column, first)
                return
            break
    for number, line, at in chain(begin, lines):
        if number < first:
            continue
        text, is_utf8 = _decoded(line)
        if text := text.lstrip(BOM).strip(SPACE):  # Joined files may have a mark in the middle.
            yield Row(number, _line_value(text, is_utf8, column), at)


def _decoded(data: bytes) -> tuple[str, bool]:
    """Return the text, and whether it is UTF-8. Bytes that are not become lone surrogates: they may be in a column that
    is not read."""
    try:
        return data.decode("utf-8"), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape"), False


def _line_value(text: str, is_utf8: bool, column: str) -> str | BadRow:
    try:
        row = _parsed(text)
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"not JSON ({error.msg.removesuffix(' at')} at character {error.pos:,})")
    except RecursionError:
        return BadRow("not JSON", "not JSON that can be read: too many values inside each other")
    return _row_value(row, is_utf8, column)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with too many digits, perhaps in a column that is not read
        return json.loads(text, parse_int=float)


def _row_value(row: Any, is_utf8: bool, column: str) -> str | BadRow:
    if isinstance(row, dict):
        if column not in row:
            return no_column(column, list(row))
        value = row[column]
    elif isinstance(row, str) and column == "text":
        value = row
    else:
        return BadRow("not an object", f"{type(row).__name__} instead of an object with a column {column!r}")
    return check_value(value, column) if is_utf8 else check_escaped(value, column)


def _rows_of_whole(text: str, is_utf8: bool, column: str, first: int) -> Iterator[Row]:
    text = text.rstrip(SPACE)
    start = len(text) - len(text.lstrip(SPACE))
    values = _array(text, start) if text[start] == "[" else _objects(text, start, column)
    for number, row in enumerate(values):
        if number >= first:
            yield Row(number, _row_value(row, is_utf8, column))


def _array(text: str, start: int) -> Iterator[Any]:
    """Yield the elements of the array that is the whole text from `start` on, as long as they can be read."""
    decoder = json.JSONDecoder()
    place, number = _skip_space(text, start + 1), 0
    while text[place : place + 1] != "]":
        if number:
            if text[place : place + 1] != ",":
                raise _broken_array(text, place, number)
            place = _skip_space(text, place + 1)
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _broken_array(text, getattr(error, "pos", place), number) from error
        yield value
        place, number = _skip_space(text, place), number + 1
    if place + 1 < len(text):
        raise BadFile("not JSON", f"text after the end of the array, at character {place + 1:,}", number)


def _broken_array(text: str, place: int, number: int) -> BadFile:
    if not text.endswith("]"):
        return BadFile("cut off", "the array does not end", number)
    return BadFile("not JSON", f"an array that cannot be read at character {place:,}", number)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def _objects(text: str, start: int, column: str) -> Iterator[Any]:
    """Yield the rows of the objects from `start` on: each is a row, or has one per element of its columns."""
    decoder = json.JSONDecoder()
    place, number = start, 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", place)
            cut_off = at >= len(text) or str(error).startswith("Unterminated string")
            raise BadFile("cut off" if cut_off else "not JSON", str(error), number) from error
        elements = value.get(column) if isinstance(value, dict) else None
        rows = [{column: element} for element in elements] if isinstance(elements, list) else [value]
        yield from rows
        place, number = _skip_space(text, place), number + len(rows)
