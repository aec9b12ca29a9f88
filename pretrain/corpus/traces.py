"""Generated programs as a source, in the formats of `lrnn eval --suite traces`, which asks about other programs."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.corpus.rows import LeftOut
from lrnn.pretrain.corpus.source import Document, num_parts, take_train
from lrnn.traces.program import SHORTEST
from lrnn.traces.training import training_document

SAMPLE = 64  # documents that tell how long documents are, and whether the generator is still the same
MOST_CHANGES = 128  # state changes of the longest program of --traces
# Options that decide what is read of files and data sets, with their defaults.
OF_SOURCES: dict[str, Any] = dict.fromkeys(("kind", "sample_by", "include", "exclude", "data_files", "config"))
OF_SOURCES |= {"text_column": "text", "split": "train"}
OF_SOURCES |= dict.fromkeys(("skip_bad_files", "skip_bad_rows", "streaming"), False)


def check_traces(args: argparse.Namespace) -> None:
    """Raise UserError unless there is either a source or `--traces`, with options that belong to it."""
    if args.traces is None:
        if args.source is None:
            raise UserError("name a SOURCE, or give --traces N for generated programs")
        if args.traces_max_changes is not None:
            raise UserError("--traces-max-changes is about generated programs: give --traces N too, and no SOURCE")
        return
    if args.source is not None:
        raise UserError(
            f"--traces {args.traces} generates its documents and takes no SOURCE, but got {args.source!r}; make two "
            "corpora, which data.corpora of a run mixes"
        )
    given = [key for key, default in OF_SOURCES.items() if getattr(args, key) != default]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is about files or data sets, which --traces does not read")
    if args.traces < 1:
        raise UserError(f"--traces {args.traces} should be at least 1")
    if args.traces_max_changes is not None and args.traces_max_changes < SHORTEST:
        raise UserError(f"--traces-max-changes {args.traces_max_changes} should be at least {SHORTEST}")


@dataclass
class TracesPart:
    """The documents `first` to `stop`, which become one shard."""

    first: int
    stop: int
    most_changes: int
    num_bytes: int
    left_out: LeftOut = field(default_factory=LeftOut)

    def documents(self) -> Iterator[Document]:
        for number in range(self.first, self.stop):
            text = training_document(number, self.most_changes)
            yield Document(text, f"traces:{number + 1}", hashlib.sha256(text.encode()).digest())


class TracesSource:
    """Generated programs.

    Args:
        count: number of documents.
        most_changes: state changes of the longest program.
    """

    def __init__(self, count: int, most_changes: int):
        self.count, self.most_changes = count, most_changes
        self.skipped: Counter[str] = Counter()
        sample = [training_document(number, most_changes).encode() for number in range(min(count, SAMPLE))]
        self.fingerprint = hashlib.sha256(b"%d\0%d\0" % (count, most_changes) + b"".join(sample)).hexdigest()
        self._bytes_per_document = sum(map(len, sample)) / len(sample)
        self.num_parts: int | None = num_parts(round(count * self._bytes_per_document), count)

    def parts(self) -> Iterator[TracesPart]:
        """Yield parts of about equal size."""
        assert self.num_parts is not None
        edges = [self.count * number // self.num_parts for number in range(self.num_parts + 1)]
        for first, stop in pairwise(edges):
            yield self._part(first, stop)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of the first train documents until `max_bytes` are reached."""
        yield from take_train(self._part(0, self.count).documents(), max_bytes, heldout)

    def _part(self, first: int, stop: int) -> TracesPart:
        return TracesPart(first, stop, self.most_changes, round((stop - first) * self._bytes_per_document))
