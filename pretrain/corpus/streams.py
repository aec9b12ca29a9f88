"""Streams of text with a position that a checkpoint can store, and the stream as the source of a corpus."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from lrnn.errors import UserError
from lrnn.pretrain.corpus.dataset import checked_texts, load_rows
from lrnn.pretrain.corpus.file_rows import check_first_row, good_rows
from lrnn.pretrain.corpus.file_source import document_of
from lrnn.pretrain.corpus.locate import Located, locate
from lrnn.pretrain.corpus.rows import LeftOut
from lrnn.pretrain.corpus.source import Document, SourceArguments, take_train

STREAM_PART_BYTES = 64 << 20  # bytes of text per part of a stream, which is held in memory


class TextStream(Protocol):
    """The documents of a source in order, epoch after epoch.

    Attributes:
        reader: what reads it: "files" or "datasets". A position means something to the same reader only.
        left_out: counts the rows and files that were left out.
    """

    reader: str
    left_out: LeftOut

    def start(self, epoch: int, state: dict | None) -> Iterator[Document]:
        """Return the documents of an epoch from the position `state` on, from its start if that is None."""
        ...

    def state(self) -> dict:
        """Return the position after the last document taken, which JSON can store."""
        ...


class FileStream:
    """The rows of files. From the second epoch on, the files come in another order.

    Raises:
        UserError: the first row cannot be read, or has no text; later, from the iterator, also any other.
    """

    reader = "files"

    def __init__(self, located: Located, arguments: SourceArguments):
        self.arguments, self.files, self.left_out = arguments, located.files, LeftOut()
        self._file = self._row = 0
        check_first_row(located.files[0], arguments)
        if next(self.start(0, None), None) is None:
            raise UserError(f"empty corpus: {self.arguments.path!r} has no rows")
        self.left_out = LeftOut()

    def start(self, epoch: int, state: dict | None) -> Iterator[Document]:
        self._file, self._row = (state["file"], state["row"]) if state else (0, 0)
        order = list(range(len(self.files)))
        if epoch:
            order.sort(key=lambda i: hashlib.sha256(f"{epoch} {i}".encode()).digest())
        while self._file < len(order):
            file = self.files[order[self._file]]
            for number, text in good_rows(file, self.arguments, self.left_out, self._row):
                self._row = number + 1
                yield document_of(file, number, text)
            self._file, self._row = self._file + 1, 0

    def state(self) -> dict:
        return {"file": self._file, "row": self._row}


class DatasetStream:
    """The rows of a data set that only `datasets` can stream.

    Raises:
        UserError: see `load_rows`, or its position cannot be stored; later, from the iterator, if it cannot be read on.
    """

    reader = "datasets"

    def __init__(self, arguments: SourceArguments):
        self.arguments, self.left_out = arguments, LeftOut()
        self._rows = load_rows(arguments, streaming=True)
        next(iter(self._rows))

    def start(self, epoch: int, state: dict | None) -> Iterator[Document]:
        self._rows.set_epoch(epoch)
        self._rows.load_state_dict(state)
        for number, text in checked_texts(self._rows, self.arguments, self.left_out):
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            yield Document(text, f"{self.arguments.path}:{number + 1}", digest)

    def state(self) -> dict:
        advice = "build a corpus from it with `lrnn corpus ... --streaming`"
        label = f"data set {self.arguments.path!r}"
        try:
            state = self._rows.state_dict()
            stored = json.loads(json.dumps(state))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(
                f"{label}: its position cannot be stored in a checkpoint ({type(error).__name__}: {error}); {advice}"
            ) from error
        if stored != state:
            raise UserError(f"{label}: its position is not the same after it is stored as JSON; {advice}")
        return stored


def open_stream(arguments: SourceArguments, reader: str | None = None) -> TextStream:
    """Open a source as a stream; `reader` is that of a position to continue from.

    Raises:
        UserError: see `locate` and the two classes.
    """
    located = locate(arguments) if reader != "datasets" else None
    return DatasetStream(arguments) if located is None else FileStream(located, arguments)


@dataclass
class StreamedPart:
    """Documents already read from a stream, which counts itself what it leaves out."""

    read: list[Document] = field(default_factory=list)
    num_bytes: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)

    def documents(self) -> Iterator[Document]:
        yield from self.read


class StreamingSource:
    """A stream, read by one process and cut into parts of about `STREAM_PART_BYTES` bytes of text."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.fingerprint = "stream"  # Nothing is known about a stream before it is read.
        self.num_parts: int | None = None

    @property
    def skipped(self) -> Counter[str]:
        """Return what was left out since the last pass began."""
        return self._stream.left_out.counts

    def _documents(self) -> Iterator[Document]:
        self._stream.left_out = LeftOut()
        return self._stream.start(0, None)

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
