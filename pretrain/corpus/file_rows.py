"""Read the rows of a file: one reader per kind of file, each of which looks at the text column alone."""

import csv
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from lrnn.errors import UserError
from lrnn.files import LFS_POINTER, NOT_FETCHED
from lrnn.pretrain.corpus.json_rows import json_rows
from lrnn.pretrain.corpus.open_file import is_compressed, is_remote, open_file, open_raw
from lrnn.pretrain.corpus.rows import (
    BadFile,
    BadRow,
    DataFile,
    LeftOut,
    Row,
    check_escaped,
    check_text,
    check_value,
    no_column,
    not_utf8,
)
from lrnn.pretrain.corpus.source import SourceArguments

BOM = b"\xef\xbb\xbf"
BATCH_ROWS = 1024


def skip_byte_order_mark(stream: BinaryIO) -> int:
    """Skip the mark at the start of a file, and return its length. It says how the text is encoded, and is no text."""
    _refuse_pointer(stream)
    head = stream.peek(3)  # type: ignore[attr-defined]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadFile("not UTF-8", "it begins with the byte-order mark of UTF-16")
    if head.startswith(BOM):
        stream.read(3)
        return 3
    return 0


def _documents(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    with open_file(file.path) as stream:
        mark = skip_byte_order_mark(stream)
        data = stream.read()
    if not data and not mark:
        raise BadFile("zero-length")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile("not UTF-8", not_utf8(error, mark)) from error
    checked = check_text(text)
    if isinstance(checked, BadRow):
        raise BadFile(*checked)
    yield Row(0, checked)


def _numbered_lines(file: DataFile, first: int, restart: int) -> Iterator[tuple[int, bytes, int | None]]:
    """Yield (number, line with its end, byte at which it begins, or None if one cannot seek there).

    The lines are all lines of the file, or with `restart` those from line `first` on.
    """
    with open_file(file.path) as stream:
        seekable = not is_remote(file.path) and not is_compressed(file.path)
        number, at = 0, skip_byte_order_mark(stream)
        if restart:
            stream.seek(restart)
            number, at = first, restart
        _refuse_empty(stream, at)
        for line in stream:
            yield number, line, at if seekable else None
            at += len(line)
            number += 1


def _refuse_empty(stream: BinaryIO, read: int) -> None:
    if not read and not stream.peek(1):  # type: ignore[attr-defined]
        raise BadFile("zero-length")


def _refuse_pointer(stream: BinaryIO) -> None:
    if stream.peek(len(LFS_POINTER)).startswith(LFS_POINTER):  # type: ignore[attr-defined]
        raise BadFile("a pointer of Git LFS", NOT_FETCHED)


def _lines(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    for number, line, at in _numbered_lines(file, first, restart):
        if number < first:
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Row(number, BadRow("not UTF-8", f"not UTF-8, {not_utf8(error)} of the line"), at)
            continue
        # A blank line is an empty text; any other keeps its end.
        yield Row(number, check_text(text) if text.rstrip("\r\n") else "", at)


def _json(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    return json_rows(_numbered_lines(file, first, restart), column, first)


def _csv(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become lone surrogates, which matter only in the text column.
    lines = (line.decode("utf-8", "surrogateescape") for _, line, _ in _numbered_lines(file, 0, 0))
    reader = csv.reader(lines, delimiter=file.delimiter, strict=True)
    header = next(reader, [])
    if column not in header:
        raise BadFile(*no_column(column, header))
    place = header.index(column)
    for number, fields in enumerate(_records(reader)):
        if number < first:
            continue
        if isinstance(fields, BadRow):
            yield Row(number, fields)
        elif not place < len(fields) <= len(header):
            message = f"{len(fields)} fields, but the header has {len(header)}: is text with {file.delimiter!r} quoted?"
            yield Row(number, BadRow("another number of fields", message))
        else:
            yield Row(number, check_escaped(fields[place], column))


def _records(reader: Any) -> Iterator[list[str] | BadRow]:
    """Yield the records that are not blank lines, and in place of one that is broken the reason."""
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow("not CSV", f"not CSV ({error})")
            continue
        if fields:
            yield fields


def _values(array: Any) -> list:
    """Return the values of an Arrow array in Python, those of text as bytes: their encoding is not yet checked."""
    import pyarrow as pa

    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    types = pa.types
    of_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary_view)
    if any(is_text(array.type) for is_text in of_text):
        array = array.cast(pa.large_binary())
    return array.to_pylist()


def _batch_rows(
    batches: Iterable[Any], column: str, number: int, first: int, cheap: bool
) -> Iterator[Row]:  # `number` is that of the first row
    for batch in batches:
        if number + len(batch) > first:
            for i, value in enumerate(_values(batch.column(column)), start=number):
                if i >= first:
                    yield Row(i, check_value(value, column), 1 if cheap and i == number else None)
        number += len(batch)


def _parquet(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with open_raw(file.path) as raw:
        _refuse_empty(raw, 0)
        _refuse_pointer(raw)
        with pq.ParquetFile(raw, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if column not in names:
                raise BadFile(*no_column(column, names))
            number = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if number + rows > first:
                    batches = parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column])
                    for row in _batch_rows(batches, column, number, first, cheap=False):
                        yield row._replace(restart=1 if row.number == number else None)
                number += rows


def _arrow(file: DataFile, column: str, first: int, restart: int) -> Iterator[Row]:
    import pyarrow as pa

    with open_file(file.path) as stream:
        _refuse_empty(stream, 0)
        _refuse_pointer(stream)
        is_file = stream.peek(6).startswith(b"ARROW1")  # type: ignore[attr-defined]
        on_disk = not is_remote(file.path) and not is_compressed(file.path)
        source: Any = pa.memory_map(file.path) if on_disk else pa.BufferReader(stream.read()) if is_file else stream
        open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
        reader = open_reader(source)
        names = reader.schema.names
        if column not in names:
            raise BadFile(*no_column(column, names))
        if on_disk:  # Other columns are not even decompressed.
            source.seek(0)
            reader = open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=[names.index(column)]))
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        yield from _batch_rows(batches, column, 0, first, cheap=True)


READERS: dict[str, Callable[[DataFile, str, int, int], Iterator[Row]]] = {
    "document": _documents,
    "lines": _lines,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}


def read_rows(file: DataFile, column: str, first: int = 0, restart: int = 0) -> Iterator[Row]:
    """Yield the rows of a file from row `first` on.

    Args:
        file: the file.
        column: the column with the text.
        first: number of the first row.
        restart: `Row.restart` of that row, or 0.

    Raises:
        BadFile: the file cannot be used, or cannot be read on.
    """
    rows = first
    try:
        for row in READERS[file.kind](file, column, first, restart):
            yield row
            rows = row.number + 1
    except (OSError, EOFError, ValueError, LookupError, NotImplementedError) as error:
        raise _bad_file(error, rows) from error
    except (zlib.error, lzma.LZMAError) as error:
        raise BadFile("unreadable", str(error), rows) from error


def good_rows(
    file: DataFile,
    arguments: SourceArguments,
    left_out: LeftOut,
    first: int = 0,
    restart: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the rows of a file that can be used, from row `first` on and before row `stop`.

    Args:
        file: the file.
        arguments: the column, and what to do with rows and files that cannot be used.
        left_out: counts them.
        first, restart: see `read_rows`.

    Raises:
        UserError: a row or the file cannot be used, and such are not to be left out; the message names file and row.
    """
    try:
        for number, value, _ in read_rows(file, arguments.text_column, first, restart):
            if stop is not None and number >= stop:
                return
            if not isinstance(value, BadRow):
                yield number, value
            elif arguments.skip_bad_rows:
                left_out.add(value.reason, row_label(file, number))
            else:
                raise UserError(
                    f"{row_label(file, number)}: {value.message}; fix it, or leave such rows out with "
                    f"{arguments.option('skip_bad_rows')}"
                )
            if number + 1 == stop:  # What follows was found to be unreadable, or is of another part.
                return
    except BadFile as error:
        if not arguments.skip_bad_files:
            where = row_label(file, error.rows) if error.rows else file.name
            raise UserError(
                f"{where}: {error}; fix the file, or leave out what cannot be read with "
                f"{arguments.option('skip_bad_files')}"
            ) from error
        left_out.add(bad_file_key(file, error), file.name)


def check_first_row(file: DataFile, arguments: SourceArguments) -> None:
    """Raise UserError if the first row of a source's first file lacks the column: then it has another name."""
    missing, where = "", file.name
    try:
        row = next(read_rows(file, arguments.text_column), None)
        if row is not None and isinstance(row.value, BadRow) and row.value.reason.startswith("no column"):
            missing, where = row.value.message, row_label(file, row.number)
    except BadFile as error:
        missing = str(error) if error.reason.startswith("no column") else ""
    if missing:
        raise UserError(f"{where}: {missing} ({arguments.option('text_column', 'NAME')})")


def row_label(file: DataFile, number: int) -> str:
    """Return the name of a row in messages, which counts from 1."""
    return f"{file.name}, row {number + 1:,}"


def bad_file_key(file: DataFile, error: BadFile) -> str:
    """Return the key under which a file that cannot be used is counted; a file that is one document needs no more."""
    return error.reason if file.kind == "document" else f"file: {error.reason}"


def _bad_file(error: Exception, rows: int) -> BadFile:
    """Return the exception for a file that cannot be read from row `rows` on."""
    if isinstance(error, OSError) and error.strerror:
        return BadFile("unreadable", error.strerror, rows)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    cut_off = isinstance(error, EOFError) or text.startswith("Truncated")
    return BadFile("cut off" if cut_off else "unreadable", text, rows)
