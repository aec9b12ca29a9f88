"""A data set that only `datasets.load_dataset` can read, as a source of text: archives, XML, cuts of splits, others."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.corpus.rows import BadRow, LeftOut, check_value, no_column
from lrnn.pretrain.corpus.source import Document, SourceArguments, num_parts, take_train

SAMPLE_SEED = 0


def load_rows(arguments: SourceArguments, streaming: bool) -> Any:
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
    except Exception as error:  # Whatever the files and the libraries that read them make of it.
        lines = str(error.__cause__ or error).splitlines() or [""]
        raise UserError(f"{label}: cannot be loaded ({type(error).__name__}: {lines[0]})") from error
    if arguments.text_column not in first:
        raise UserError(f"{label}: {no_column(arguments.text_column, sorted(first)).message}")
    return rows.select_columns([arguments.text_column])


def checked_texts(
    rows: Iterable[dict], arguments: SourceArguments, left_out: LeftOut, first: int = 0
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of the rows that can be used; `first` is the number of the first row.

    Raises:
        UserError: a row cannot be used and is not to be left out, or the data set cannot be read on.
    """
    number, iterator = first, iter(rows)
    while True:
        where = f"data set {arguments.path!r}, row {number + 1:,}"
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # Whatever the files and the libraries that read them make of it.
            lines = str(error.__cause__ or error).splitlines() or [""]
            raise UserError(f"{where}: cannot be read ({type(error).__name__}: {lines[0]})") from error
        text = check_value(row[arguments.text_column], arguments.text_column)
        if not isinstance(text, BadRow):
            yield number, text
        elif arguments.skip_bad_rows:
            left_out.add(text.reason, where)
        else:
            raise UserError(f"{where}: {text.message}; leave such rows out with {arguments.option('skip_bad_rows')}")
        number += 1


@dataclass
class RowsPart:
    """A run of rows of a data set, from row `first_row` on."""

    rows: Any  # iterates over dictionaries
    arguments: SourceArguments
    first_row: int
    num_bytes: int
    left_out: LeftOut = field(default_factory=LeftOut)

    def documents(self) -> Iterator[Document]:
        for number, text in checked_texts(self.rows, self.arguments, self.left_out, self.first_row):
            # The digest is of the content, so that copies of a text are all held out or all trained on.
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            yield Document(text, f"{self.arguments.path}:{number + 1}", digest)


class DatasetSource:
    """A data set on disk, of which every row is a document.

    Raises:
        UserError: see `load_rows`.
    """

    def __init__(self, arguments: SourceArguments):
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
            yield RowsPart(self.rows.select(range(first, last)), self.arguments, first, share)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of random train rows, until `max_bytes` are reached."""
        rows = self.rows.shuffle(seed=SAMPLE_SEED, keep_in_memory=True)
        yield from take_train(RowsPart(rows, self.arguments, 0, 0).documents(), max_bytes, heldout)
