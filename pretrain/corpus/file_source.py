"""Files as a source of text: a first pass finds what cannot be used, and cuts the files into pieces of equal work."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from lrnn.errors import UserError
from lrnn.pretrain.corpus import source
from lrnn.pretrain.corpus.file_rows import bad_file_key, check_first_row, good_rows, read_rows, row_label
from lrnn.pretrain.corpus.locate import Located
from lrnn.pretrain.corpus.open_file import is_remote
from lrnn.pretrain.corpus.progress import Progress
from lrnn.pretrain.corpus.rows import BadFile, BadRow, DataFile, LeftOut
from lrnn.pretrain.corpus.source import Document, SourceArguments, num_parts, take_train

SLOW_PIECE_BYTES = 256 << 20  # bytes of text per piece where reading from its first row means reading all before it
SAMPLE_PIECES = 256  # pieces that a sample for a tokenizer is spread over
SHOWN = 3  # problems that a message names


class Piece(NamedTuple):
    """Rows `first` to `stop` of a file; `restart` is that of the first, see `Row`."""

    file: DataFile
    first: int
    stop: int
    restart: int
    num_bytes: int  # of text


@dataclass
class FilesPart:
    """Pieces of files, which become one shard."""

    pieces: list[Piece]
    arguments: SourceArguments
    num_bytes: int
    left_out: LeftOut = field(default_factory=LeftOut)

    def documents(self) -> Iterator[Document]:
        for piece in self.pieces:
            rows = good_rows(piece.file, self.arguments, self.left_out, piece.first, piece.restart, piece.stop)
            for number, text in rows:
                yield document_of(piece.file, number, text)


def document_of(file: DataFile, number: int, text: str) -> Document:
    """Return a row as a document.

    The digest of a file that is one document is of its name. That of a row is of its text, so that copies of a text are
    all held out or all trained on.
    """
    if file.kind == "document":
        return Document(text, file.label, hashlib.sha256(os.fsencode(file.label)).digest())
    return Document(text, f"{file.label}:{number + 1}", hashlib.sha256(text.encode("utf-8")).digest())


@dataclass
class FileScan:
    """The result of the first pass over a file.

    Attributes:
        pieces: what can be read of it.
        facts: size and time of the last change, to notice a change.
        bad_file: why it cannot be used, or not from some row on; "" if it can.
        reason: the same, by which such files are counted.
        bad_row: its first row that cannot be used; "" if there is none.
    """

    pieces: list[Piece] = field(default_factory=list)
    facts: tuple[int, int] = (0, 0)
    bad_file: str = ""
    reason: str = ""
    bad_row: str = ""


def scan_file(file: DataFile, arguments: SourceArguments, piece_bytes: int) -> FileScan:
    """Read a file once, before any work is done: up to its first bad row, if such rows are not to be left out."""
    scan = FileScan()
    first, restart, stop, num_bytes = 0, 0, 0, 0
    try:
        stat = os.stat(file.path)
        scan.facts = (stat.st_size, stat.st_mtime_ns)
        for row in read_rows(file, arguments.text_column):
            if (row.restart is not None and num_bytes >= piece_bytes) or num_bytes >= SLOW_PIECE_BYTES:
                scan.pieces.append(Piece(file, first, row.number, restart, num_bytes))
                first, restart, num_bytes = row.number, row.restart or 0, 0
            stop = row.number + 1
            if not isinstance(row.value, BadRow):
                num_bytes += len(row.value) if row.value.isascii() else len(row.value.encode("utf-8"))
            elif not scan.bad_row:
                scan.bad_row = f"{row_label(file, row.number)}: {row.value.message}"
                if not arguments.skip_bad_rows:
                    break
    except BadFile as error:
        scan.reason = bad_file_key(file, error)
        scan.bad_file = f"{row_label(file, error.rows) if error.rows else file.name}: {error}"
    except OSError as error:
        scan.reason, scan.bad_file = "unreadable", f"{file.name}: unreadable, {error.strerror or error}"
    if stop > first:
        scan.pieces.append(Piece(file, first, stop, restart, num_bytes))
    return scan


class FileSource:
    """Files, of which every row is a document, or every file of text.

    Files at a URL are downloaded to the cache of `datasets`.

    Args:
        located: the files.
        arguments: the column, and what to do with rows and files that cannot be used.
        map_files: `map_files(function, files, files_per_task)` returns an iterator over the results in order.

    Raises:
        UserError: a row or a file cannot be used and is not to be left out, or nothing is left.
    """

    def __init__(
        self, located: Located, arguments: SourceArguments, map_files: Callable[[Any, Any, int], Iterable[FileScan]]
    ):
        files = _downloaded(located.files)
        self.arguments = arguments
        check_first_row(files[0], arguments)
        scans = self._scan(files, map_files)
        _check_usable(located, files, scans, arguments)
        self.pieces = [piece for scan in scans for piece in scan.pieces]
        if not self.pieces:
            bad = sum(bool(scan.bad_file) for scan in scans)
            left_out = f" ({bad} bad ones left out)" if bad else ""
            raise UserError(f"empty corpus: {located.name} holds no row{left_out}")
        self.skipped = Counter(scan.reason for scan in scans if scan.reason)
        facts = (b"%s\0%d\0%d\n" % (os.fsencode(f.label), *s.facts) for f, s in zip(files, scans, strict=True))
        self.fingerprint = hashlib.sha256(b"".join(facts)).hexdigest()
        self._num_bytes = sum(piece.num_bytes for piece in self.pieces)
        rows = sum(piece.stop - piece.first for piece in self.pieces)
        self.num_parts: int | None = min(num_parts(self._num_bytes, rows), len(self.pieces))

    def _scan(self, files: list[DataFile], map_files: Callable[[Any, Any, int], Iterable[FileScan]]) -> list[FileScan]:
        check = partial(scan_file, arguments=self.arguments, piece_bytes=source.MIN_PART_BYTES)
        small = all(file.kind == "document" for file in files)
        progress = Progress("checking", "checked", None)
        scans = []
        try:
            for scan in map_files(check, files, 64 if small else 1):
                scans.append(scan)
                progress.add(sum(piece.num_bytes for piece in scan.pieces))
        finally:
            progress.close()
        return scans

    def parts(self) -> Iterator[FilesPart]:
        """Yield runs of pieces of about equal size."""
        assert self.num_parts is not None
        share = max(1, self._num_bytes) / self.num_parts
        groups: list[list[Piece]] = [[] for _ in range(self.num_parts)]
        before = 0
        for piece in self.pieces:
            middle = before + piece.num_bytes / 2  # The middle of a piece decides.
            groups[min(int(middle / share), self.num_parts - 1)].append(piece)
            before += piece.num_bytes
        for group in groups:
            yield FilesPart(group, self.arguments, sum(piece.num_bytes for piece in group))

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of train documents from pieces in the order of their hashes, until `max_bytes` are reached.

        A piece gives its first documents only, so that the sample is of many pieces.
        """

        def place(piece: Piece) -> bytes:
            row = b":%d" % piece.first if piece.file.kind != "document" else b""
            return hashlib.sha256(b"sample " + os.fsencode(piece.file.label) + row).digest()

        share = max_bytes
        if self._num_bytes > max_bytes:
            share = max(1, max_bytes // min(len(self.pieces), SAMPLE_PIECES))
        taken = 0
        for piece in sorted(self.pieces, key=place):
            part = FilesPart([piece], self.arguments, piece.num_bytes)
            for text in take_train(part.documents(), share, heldout):
                yield text
                taken += len(text.encode("utf-8"))
                if taken >= max_bytes:
                    return


def _downloaded(files: list[DataFile]) -> list[DataFile]:
    """Return the files with those at a URL on disk, under their own labels."""
    remote = [file.path for file in files if is_remote(file.path)]
    if not remote:
        return files
    import datasets

    try:
        paths = dict(zip(remote, datasets.DownloadManager().download(remote), strict=True))
    except Exception as error:  # Each protocol of a URL has errors of its own.
        lines = str(error).splitlines() or [""]
        raise UserError(f"data files {remote[0]}, ...: cannot be downloaded ({lines[0]})") from error
    return [DataFile(paths.get(file.path, file.path), file.label, file.kind, file.delimiter) for file in files]


def _check_usable(located: Located, files: list[DataFile], scans: list[FileScan], arguments: SourceArguments) -> None:
    """Raise UserError if a file or a row cannot be used, and is not to be left out."""
    bad_files = [scan.bad_file for scan in scans if scan.bad_file]
    if bad_files and not arguments.skip_bad_files:
        raise UserError(
            f"{located.name}: {len(bad_files)} of {len(files)} files cannot be used "
            f"({_first(bad_files)}). Fix or exclude them, or leave them out with {arguments.option('skip_bad_files')}"
        )
    bad_rows = [scan.bad_row for scan in scans if scan.bad_row]
    if bad_rows and not arguments.skip_bad_rows:
        raise UserError(
            f"{located.name}: {len(bad_rows)} of {len(files)} files have rows that cannot be used "
            f"({_first(bad_rows)}). Fix them, or leave such rows out with {arguments.option('skip_bad_rows')}"
        )


def _first(problems: list[str]) -> str:
    return "; ".join(problems[:SHOWN]) + ("; ..." if len(problems) > SHOWN else "")
