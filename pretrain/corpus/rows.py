"""Rows of text, what makes one unusable, and the policy for unusable rows and files.

A row is usable if it holds valid Unicode. A null is taken as an empty text. Rows and files that cannot be used end the
work with one line that names them, or are left out and counted with `skip_bad_rows` and `skip_bad_files`.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

NUL_SHARE = 0.3  # of the characters: above it, a text is no text but binary, UTF-16, or a file that was never written


@dataclass(frozen=True)
class DataFile:
    """A file with text.

    Attributes:
        path: path on disk, or URL.
        label: name of the file in `heldout.jsonl` and in the digest that decides whether a document is held out.
        kind: "document" (a text file that is one document), "lines", "json", "csv", "parquet" or "arrow".
        delimiter: between the fields of a row of CSV.
    """

    path: str
    label: str
    kind: str
    delimiter: str = ","

    @property
    def name(self) -> str:
        """Return the name of the file in messages; the path of a downloaded file says nothing."""
        return self.path if self.path.endswith(self.label) else self.label


class BadRow(NamedTuple):
    """A row that cannot be used: the reason, by which such rows are counted, and what a message says."""

    reason: str
    message: str


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        number: number of the row, from 0. In JSON lines and text it is the number of the line.
        value: its text, "" for null.
        restart: where to start reading again at this row, for `read_rows`; None if that is no faster than from the
            start of the file.
    """

    number: int
    value: str | BadRow
    restart: int | None = None


class BadFile(Exception):
    """A file that cannot be used, or not from some row on.

    Attributes:
        reason: by which such files are counted.
        detail: what a message says besides.
        rows: number of the first row that cannot be read: 0 if none can.
    """

    def __init__(self, reason: str, detail: str = "", rows: int = 0):
        super().__init__(detail if detail.startswith(reason) else f"{reason}, {detail}" if detail else reason)
        self.reason, self.detail, self.rows = reason, detail, rows


@dataclass
class LeftOut:
    """What was left out, by reason: how often, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, where)


def not_utf8(error: UnicodeDecodeError, offset: int = 0) -> str:
    """Return where a text stops being UTF-8, for a message; `offset` is the place of its first byte."""
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start + offset}"


def check_text(text: str) -> str | BadRow:
    """Return `text`, or why it is not usable."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            return BadRow("half a surrogate pair", f"half a surrogate pair, U+{code:04X} at character {error.start}")
    nuls = text.count("\0")
    if nuls > NUL_SHARE * len(text):
        return BadRow("NUL characters", f"{nuls:,} of {len(text):,} characters are NUL: this is no text")
    return text


def check_value(value: object, column: str) -> str | BadRow:
    """Return the text in a row's column, or why it is not usable."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRow("not UTF-8", f"column {column!r} is not UTF-8, {not_utf8(error)}")
    if not isinstance(value, str):
        return BadRow(
            "not text", f"column {column!r} holds {type(value).__name__} ({_short(value)}), it should hold text"
        )
    return check_text(value)


def check_escaped(value: object, column: str) -> str | BadRow:
    """Return what `check_value` does, of a value that was decoded with the error handler "surrogateescape"."""
    if isinstance(value, str):
        for place, character in enumerate(value):
            if "\udc80" <= character <= "\udcff":
                byte = ord(character) - 0xDC00
                message = f"column {column!r} is not UTF-8, byte 0x{byte:02x} at character {place}"
                return BadRow("not UTF-8", message)
    return check_value(value, column)


def _short(value: object) -> str:
    try:
        return f"{value!r:.40}".replace("\n", " ")
    except ValueError:  # an integer with too many digits to print
        return "..."


def no_column(column: str, present: list[str]) -> BadRow:
    """Return why a row without the column is not usable."""
    shown = ", ".join(map(repr, sorted(present)[:20])) + (", ..." if len(present) > 20 else "")
    return BadRow(f"no column {column!r}", f"no column {column!r}; the text column can be one of [{shown}]")
