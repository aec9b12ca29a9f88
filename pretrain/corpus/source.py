"""A source of text for a corpus: documents, in parts that one process each turns into one shard.

A part is a picklable run of documents in a fixed order. `file_source`, `dataset` and `streams` have the sources.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lrnn.pretrain.corpus.rows import LeftOut

MIN_PART_BYTES = 8 << 20  # bytes of text below which a part is not worth a task
MAX_PARTS = 1024


@dataclass(frozen=True)
class SourceArguments:
    """What to read, and how.

    Attributes:
        path: a file, a folder, a URL, a builder of `datasets` such as "json" with `data_files`, or a name on the hub.
        name: configuration of a data set.
        data_files: globs or URLs; relative to `path` if that is a folder.
        split: split of a data set.
        text_column: column with the text.
        kind: "text", "json", "csv", "parquet" or "arrow", to read files as that; None to look at them.
        sample_by: whether a "document" of text files is a file or a "line"; None for a file, and with the builder
            "text" for a line.
        include, exclude: globs of the files of a folder, see `list_files`; None for all and for none.
        skip_bad_files, skip_bad_rows: whether to leave out and count what cannot be used, instead of raising.
        of_run: whether they come from the configuration of a run, for messages.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"
    kind: str | None = None
    sample_by: str | None = None
    include: list[str] | None = None
    exclude: list[str] | None = None
    skip_bad_files: bool = False
    skip_bad_rows: bool = False
    of_run: bool = False

    def option(self, name: str, value: str = "") -> str:
        """Return how to set one of them, for a message: as an option of `lrnn corpus`, or as a key of a run."""
        if self.of_run:
            return f"data.stream.{name}={value or 'true'}"
        return f"--{name.replace('_', '-')} {value}".rstrip()


class Document(NamedTuple):
    """A document. Its digest, the sha256 of a file's path or of a row's text, decides whether it is held out."""

    text: str
    source: str
    digest: bytes


class Part(Protocol):
    """A run of documents, in a fixed order, that becomes one shard.

    Attributes:
        num_bytes: bytes of UTF-8 text, known or estimated.
        left_out: counts the rows that `documents` leaves out.
    """

    num_bytes: int
    left_out: LeftOut

    def documents(self) -> Iterator[Document]: ...


class Source(Protocol):
    """A source of text.

    Attributes:
        fingerprint: changes when the source does.
        skipped: counts what was left out, by reason, except for what its parts count; complete when they are read.
        num_parts: number of parts; None if it is only known after the whole source is read.
    """

    fingerprint: str
    num_parts: int | None

    @property
    def skipped(self) -> Counter[str]: ...

    def parts(self) -> Iterator[Part]: ...

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of train documents for a tokenizer, until `max_bytes` are reached."""
        ...


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Return whether the document with this sha256 is held out. The answer does not depend on order, part or run."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def num_parts(num_bytes: int, num_documents: int) -> int:
    """Return a number of parts that depends on the data only: the corpus is the same for any number of processes."""
    return max(1, min(num_documents, MAX_PARTS, round(num_bytes / MIN_PART_BYTES)))


def take_train(documents: Iterable[Document], max_bytes: int, heldout: float) -> Iterator[str]:
    """Yield the texts of train documents until `max_bytes` are reached."""
    taken = 0
    for document in documents:
        if document.text and not is_heldout(document.digest, heldout):
            yield document.text
            taken += len(document.text.encode("utf-8"))
            if taken >= max_bytes:
                return
