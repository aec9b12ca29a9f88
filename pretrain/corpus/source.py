"""A source of text for a corpus: documents, in parts that one process each turns into one shard.

A part is a picklable run of documents in a fixed order. `folder` and `dataset` have the sources.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

MIN_PART_BYTES = 8 << 20  # bytes of text below which a part is not worth a task
MAX_PARTS = 1024


class Document(NamedTuple):
    """A document. Its digest, the sha256 of a file's path or of a row's text, decides whether it is held out."""

    text: str
    source: str
    digest: bytes


class Part(Protocol):
    """A run of documents, in a fixed order, that becomes one shard."""

    num_bytes: int  # bytes of UTF-8 text, known or estimated

    def documents(self) -> Iterator[Document]: ...


class Source(Protocol):
    """A source of text.

    Attributes:
        fingerprint: changes when the source does.
        skipped: counts what was left out, by reason.
        num_parts: number of parts; None if it is only known after the whole source is read.
    """

    fingerprint: str
    skipped: Counter[str]
    num_parts: int | None

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
