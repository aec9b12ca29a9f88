"""A data set as a source of text: anything that `datasets.load_dataset` takes, read from disk or streamed."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.corpus.source import Document, num_parts, take_train

STREAM_PART_BYTES = 64 << 20  # bytes of text per part of a stream, which is held in memory
SAMPLE_SEED = 0


@dataclass
class DatasetArguments:
    """Arguments of `datasets.load_dataset`, and the column with the text."""

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"


def text_of(row: dict, column: str, label: str) -> str:
    """Return the text of a row, "" if it is missing. Raise UserError if the column holds something else."""
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"data set {label!r}: column {column!r} holds {type(text).__name__} ({text!r:.40}), not text")
    return text or ""


@dataclass
class RowsPart:
    """A run of rows of a data set."""

    rows: Any  # iterates over dictionaries
    label: str  # name of the data set
    text_column: str
    first_row: int  # number of the first row
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        for number, row in enumerate(self.rows, start=self.first_row):
            text = text_of(row, self.text_column, self.label)
            # The digest is of the content, so that copies of a text are all held out or all trained on.
            yield Document(text, f"{self.label}:{number}", hashlib.sha256(text.encode("utf-8")).digest())


def load_rows(arguments: DatasetArguments, streaming: bool) -> Any:
    """Return the text column of a data set: a `Dataset`, or an `IterableDataset` if `streaming`.

    Raises:
        UserError: the data set cannot be loaded, has no rows, or lacks the column.
    """
    import datasets

    label = f"data set {arguments.path!r}"
    try:
        rows = datasets.load_dataset(
            arguments.path, arguments.name, data_files=arguments.data_files, split=arguments.split, streaming=streaming
        )
        first = next(iter(rows))  # A stream may not know its columns before.
    except StopIteration as error:  # `datasets` itself raises one for an empty file.
        raise UserError(f"empty corpus: {label}, split {arguments.split!r}, has no rows") from error
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error.__cause__ or error).splitlines() or [""]
        raise UserError(f"{label}: cannot be loaded ({type(error).__name__}: {lines[0]})") from error
    if arguments.text_column not in first:
        raise UserError(f"{label}: no column {arguments.text_column!r}; --text-column can be one of {sorted(first)}")
    text_of(first, arguments.text_column, arguments.path)
    return rows.select_columns([arguments.text_column])


class DatasetSource:
    """A data set on disk, of which every row is a document.

    Raises:
        UserError: see `load_rows`.
    """

    def __init__(self, arguments: DatasetArguments):
        self.arguments = arguments
        self.rows = load_rows(arguments, streaming=False)
        self.fingerprint = f"{self.rows._fingerprint}-{len(self.rows)}"
        self.skipped: Counter[str] = Counter()
        self.num_parts: int | None = num_parts(self.rows.data.nbytes, len(self.rows))

    def parts(self) -> Iterator[RowsPart]:
        """Yield contiguous runs of rows of about equal length."""
        assert self.num_parts is not None
        cuts = [len(self.rows) * i // self.num_parts for i in range(self.num_parts + 1)]
        for first, last in pairwise(cuts):
            # A contiguous selection is pickled as a file name and a range, not as data.
            share = self.rows.data.nbytes * (last - first) // len(self.rows)
            part = self.rows.select(range(first, last))
            yield RowsPart(part, self.arguments.path, self.arguments.text_column, first, share)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of random train rows, until `max_bytes` are reached."""
        rows = self.rows.shuffle(seed=SAMPLE_SEED, keep_in_memory=True)
        part = RowsPart(rows, self.arguments.path, self.arguments.text_column, 0, 0)
        yield from take_train(part.documents(), max_bytes, heldout)


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
        self.fingerprint = "stream"  # Nothing is known about a stream before it is read.
        self.skipped: Counter[str] = Counter()
        self.num_parts: int | None = None

    def _documents(self) -> Iterator[Document]:
        yield from RowsPart(self.rows, self.arguments.path, self.arguments.text_column, 0, 0).documents()

    def parts(self) -> Iterator[StreamedPart]:
        """Read the stream, and yield its documents in runs of about `STREAM_PART_BYTES`."""
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
        """Yield texts of the stream's first train documents. A random sample would need the whole stream."""
        yield from take_train(self._documents(), max_bytes, heldout)
