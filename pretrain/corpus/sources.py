"""Where the text of a corpus comes from: a folder of files, or anything that `datasets.load_dataset` takes.

A source is cut into parts, each a picklable run of documents in a fixed order that one process turns into one shard.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lrnn.errors import UserError

MIN_PART_BYTES = 8 << 20  # text; a smaller part is not worth a task
MAX_PARTS = 1024
STREAM_PART_BYTES = 64 << 20  # text; a part of a stream is held in memory
SAMPLE_SEED = 0


class Document(NamedTuple):
    """One document. `digest` (sha256) decides whether it is held out: of a file's path, of a row's text."""

    text: str
    source: str
    digest: bytes


class Part(Protocol):
    """A run of documents, in a fixed order, that becomes one shard."""

    num_bytes: int  # of UTF-8 text, known or estimated

    def documents(self) -> Iterator[Document]: ...


class Source(Protocol):
    """A source of text.

    `fingerprint` changes when the source does; `skipped` counts what was left out, by reason; `num_parts` is None when
    only reading to the end will tell.
    """

    fingerprint: str
    skipped: Counter[str]
    num_parts: int | None

    def parts(self) -> Iterator[Part]: ...

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]: ...


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Whether the document of this sha256 is held out: a pure function, the same for every order, part and run."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _num_parts(num_bytes: int, num_documents: int) -> int:
    """Depends on the data alone, so that the corpus is the same whatever the number of processes."""
    return max(1, min(num_documents, MAX_PARTS, round(num_bytes / MIN_PART_BYTES)))


# --- a folder ---------------------------------------------------------------------------------------------------------


@dataclass
class FolderPart:
    root: Path
    files: list[str]
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        for name in self.files:
            data = (self.root / name).read_bytes()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.root / name}: changed while the corpus was built, no longer UTF-8") from error
            yield Document(text, name, hashlib.sha256(os.fsencode(name)).digest())


def list_files(root: Path, include: list[str], exclude: list[str]) -> list[str]:
    """Paths below `root`, relative and sorted, of the files that match a glob of `include` and none of `exclude`.

    A glob is tried on the whole relative path and on the file's name; `*` also matches `/`. Symbolic links to folders
    are not followed; sockets, pipes and devices are left out.
    """

    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch(name, g) or fnmatch(os.path.basename(name), g) for g in globs)

    def fail(error: OSError) -> None:
        raise UserError(f"folder {error.filename}: cannot be listed ({error.strerror})") from error

    found = []
    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            usable = os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
            if usable and matches(relative, include) and not matches(relative, exclude):
                found.append(relative)
    return sorted(found)


class FileCheck(NamedTuple):
    """What the first pass found in a file: its size, a stamp that changes with it, and why it is bad (or "")."""

    size: int
    mtime_ns: int
    reason: str
    detail: str


def check_file(path: Path) -> FileCheck:
    """Read a file once, to find out before any work whether it is text."""
    try:
        mtime_ns = path.stat().st_mtime_ns
        data = path.read_bytes()
    except OSError as error:
        return FileCheck(0, 0, "unreadable", error.strerror or str(error))
    if not data:
        return FileCheck(0, mtime_ns, "zero-length", "")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return FileCheck(len(data), mtime_ns, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start}")
    return FileCheck(len(data), mtime_ns, "", "")


class FolderSource:
    """Every matching file of a folder is a document.

    Args:
        root: the folder.
        include, exclude: globs, see `list_files`.
        skip_bad_files: leave out files that are empty, unreadable or not UTF-8, instead of stopping.
        map_files: `map`, or a process pool's, for the pass over all files.

    Raises:
        UserError: the folder is missing, a file is bad, or no file is left.
    """

    def __init__(self, root: Path, include: list[str], exclude: list[str], skip_bad_files: bool = False, map_files=map):
        if not root.is_dir():
            raise UserError(f"folder {root}: there is no such folder")
        names = list_files(root, include, exclude)
        checks = list(map_files(check_file, [root / name for name in names]))
        bad = [(name, check) for name, check in zip(names, checks, strict=True) if check.reason]
        if bad and not skip_bad_files:
            first = "; ".join(f"{n}: {c.reason}" + (f", {c.detail}" if c.detail else "") for n, c in bad[:3])
            raise UserError(
                f"folder {root}: {len(bad)} of {len(names)} files cannot be used "
                f"({first}{'; ...' if len(bad) > 3 else ''}). "
                "Mend or exclude them, or leave them out with --skip-bad-files"
            )
        good = [(name, check) for name, check in zip(names, checks, strict=True) if not check.reason]
        if not good:
            left_out = f", {len(bad)} bad ones left out" if bad else ""
            raise UserError(f"empty corpus: no file of folder {root} matches {include} without {exclude}{left_out}")
        self.root = root
        self.files = [name for name, _ in good]
        self.sizes = [check.size for _, check in good]
        self.skipped = Counter(check.reason for _, check in bad)
        self.fingerprint = hashlib.sha256(
            b"".join(b"%s\0%d\0%d\n" % (os.fsencode(n), c.size, c.mtime_ns) for n, c in good)
        ).hexdigest()
        self.num_parts: int | None = _num_parts(sum(self.sizes), len(self.files))

    def parts(self) -> Iterator[FolderPart]:
        assert self.num_parts is not None
        share = sum(self.sizes) / self.num_parts
        groups: list[list[str]] = [[] for _ in range(self.num_parts)]
        sizes = [0] * self.num_parts
        before = 0
        for name, size in zip(self.files, self.sizes, strict=True):
            part = min(int((before + size / 2) / share), self.num_parts - 1)  # a file goes where its middle falls
            groups[part].append(name)
            sizes[part] += size
            before += size
        for group, size in zip(groups, sizes, strict=True):
            yield FolderPart(self.root, group, size)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Texts of train files in the order of their hashes, until `max_bytes` are reached."""
        order = sorted(self.files, key=lambda name: hashlib.sha256(b"sample " + os.fsencode(name)).digest())
        yield from _take_train(FolderPart(self.root, order, sum(self.sizes)).documents(), max_bytes, heldout)


# --- a data set -------------------------------------------------------------------------------------------------------


@dataclass
class DatasetArguments:
    """What `datasets.load_dataset` is called with."""

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"


def text_of(row: dict, column: str, label: str) -> str:
    """The text of a row, "" for a missing one. Raises UserError if it is no text."""
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"data set {label!r}: column {column!r} holds {type(text).__name__} ({text!r:.40}), not text")
    return text or ""


@dataclass
class RowsPart:
    """Rows `first_row`... of a data set; `rows` iterates over dictionaries."""

    rows: Any
    label: str
    text_column: str
    first_row: int
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self.rows, start=self.first_row):
            text = text_of(row, self.text_column, self.label)
            # By content, so that copies of one text fall on the same side.
            yield Document(text, f"{self.label}:{number}", hashlib.sha256(text.encode("utf-8")).digest())


def load_rows(arguments: DatasetArguments, streaming: bool) -> Any:
    """`datasets.load_dataset` with the text column alone: a `Dataset`, or an `IterableDataset` when streaming.

    Raises:
        UserError: it cannot be loaded, has no rows, or no such column.
    """
    import datasets

    label = f"data set {arguments.path!r}"
    try:
        rows = datasets.load_dataset(
            arguments.path, arguments.name, data_files=arguments.data_files, split=arguments.split, streaming=streaming
        )
        first = next(iter(rows))  # a stream may know its columns only then
    except StopIteration as error:  # `datasets` itself lets one escape for a file with nothing in it
        raise UserError(f"empty corpus: {label}, split {arguments.split!r}, has no rows") from error
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error.__cause__ or error).splitlines() or [""]
        raise UserError(f"{label}: cannot be loaded ({type(error).__name__}: {lines[0]})") from error
    if arguments.text_column not in first:
        raise UserError(f"{label}: no column {arguments.text_column!r}; --text-column can be one of {sorted(first)}")
    text_of(first, arguments.text_column, arguments.path)
    return rows.select_columns([arguments.text_column])


class DatasetSource:
    """A data set on disk: every row is a document.

    Raises:
        UserError: see `load_rows`.
    """

    def __init__(self, arguments: DatasetArguments):
        self.arguments = arguments
        self.rows = load_rows(arguments, streaming=False)
        self.fingerprint = f"{self.rows._fingerprint}-{len(self.rows)}"
        self.skipped: Counter[str] = Counter()
        self.num_parts: int | None = _num_parts(self.rows.data.nbytes, len(self.rows))

    def parts(self) -> Iterator[RowsPart]:
        assert self.num_parts is not None
        cuts = [len(self.rows) * i // self.num_parts for i in range(self.num_parts + 1)]
        for first, last in pairwise(cuts):
            # A contiguous selection pickles as file name and range, not as data.
            share = self.rows.data.nbytes * (last - first) // len(self.rows)
            part = self.rows.select(range(first, last))
            yield RowsPart(part, self.arguments.path, self.arguments.text_column, first, share)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Texts of random train rows, until `max_bytes` are reached."""
        rows = self.rows.shuffle(seed=SAMPLE_SEED, keep_in_memory=True)
        part = RowsPart(rows, self.arguments.path, self.arguments.text_column, 0, 0)
        yield from _take_train(part.documents(), max_bytes, heldout)


@dataclass
class StreamedPart:
    """Documents already read from a stream."""

    read: list[Document] = field(default_factory=list)
    num_bytes: int = 0

    def documents(self) -> Iterator[Document]:
        yield from self.read


class StreamingSource:
    """A streamed data set, read by one process and cut into parts of about `STREAM_PART_BYTES` bytes of text.

    Raises:
        UserError: see `load_rows`.
    """

    def __init__(self, arguments: DatasetArguments):
        self.arguments = arguments
        self.rows = load_rows(arguments, streaming=True)
        self.fingerprint = "stream"  # nothing is known of a stream before it is read
        self.skipped: Counter[str] = Counter()
        self.num_parts: int | None = None

    def _documents(self) -> Iterator[Document]:
        yield from RowsPart(self.rows, self.arguments.path, self.arguments.text_column, 0, 0).documents()

    def parts(self) -> Iterator[StreamedPart]:
        part = StreamedPart()
        for document in self._documents():
            part.read.append(document)
            part.num_bytes += len(document.text.encode("utf-8"))
            if part.num_bytes >= STREAM_PART_BYTES:
                yield part
                part = StreamedPart()
        if part.read:
            yield part

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Texts of the stream's first train documents: a random sample would need all of it."""
        yield from _take_train(self._documents(), max_bytes, heldout)


def _take_train(documents: Iterable[Document], max_bytes: int, heldout: float) -> Iterator[str]:
    taken = 0
    for document in documents:
        if document.text and not is_heldout(document.digest, heldout):
            yield document.text
            taken += len(document.text.encode("utf-8"))
            if taken >= max_bytes:
                return
