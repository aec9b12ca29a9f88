"""A streamed data set, tokenised while training: for a first try on data that is not on disk.

Every process reads and tokenises the whole stream and keeps its own micro-batches. The samples are therefore the same
on any number of processes, but each process does all of the work; build a corpus for a long run.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lrnn.errors import UserError
from lrnn.paths import seen_from
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.config import BUILDERS
from lrnn.pretrain.corpus.rows import LeftOut
from lrnn.pretrain.corpus.source import SourceArguments
from lrnn.pretrain.corpus.streams import open_stream
from lrnn.pretrain.data.micro_batch import MicroBatch, build_micro_batch
from lrnn.pretrain.data.order import window_index
from lrnn.pretrain.data.prefetch import Prefetcher, set_thread_device
from lrnn.tokenizer import Tokenizer

BLOCK_DOCUMENTS = 256  # documents that are read and tokenised at once


class _Block(NamedTuple):
    """Some documents of the stream, and the position to read them again from."""

    epoch: int
    number: int  # number of the block in its epoch
    source: dict | None  # the stream's position before the block; None at the start of an epoch
    tokens: np.ndarray  # [n] int64
    starts: np.ndarray  # positions at which its documents start, int64
    left_out: LeftOut  # what was left out while the block was read


class StreamData:
    """A streamed data set as an endless sequence of samples.

    The documents of the stream are joined one after the other, epoch after epoch; sample i is tokens
    `[i * seq_len, (i + 1) * seq_len]` of the result. With `shuffle_buffer`, each run of that many documents is put in
    random order (a seeded order of whole runs, not a sliding buffer, so that a position can be stored exactly). From
    the second epoch on, the files of the stream come in another order.

    Args:
        arguments: what to stream.
        tokenizer: encodes the documents.
        seq_len: tokens per sample.
        seed: seed of the shuffling.
        shuffle_buffer: number of documents that are shuffled together; 0 keeps the order of the stream.
        reset_at_document_boundaries: whether to set `cu_seqlens`.

    Raises:
        UserError: the source cannot be read, is empty, or its position cannot be stored in a checkpoint.
    """

    def __init__(
        self,
        arguments: SourceArguments,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int = 0,
        shuffle_buffer: int = 0,
        reset_at_document_boundaries: bool = False,
    ):
        self.arguments = arguments
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.reset_at_document_boundaries = reset_at_document_boundaries
        self._text = open_stream(arguments)
        self._text.state()  # A stream that cannot resume is refused before training.

    @property
    def fingerprint(self) -> str:
        """Return a sha256 of what decides the samples, except for the streamed data itself, which cannot be checked."""
        return self.fingerprint_with(self.tokenizer.fingerprint)

    def fingerprint_from(self, folder: Path) -> str:
        """Return the fingerprint with paths as `folder` sees them, which do not depend on the current folder."""
        path, files = self.arguments.path, self.arguments.data_files
        if path not in BUILDERS:
            path = seen_from(path, folder)
        if files and not os.path.isdir(self.arguments.path):
            files = [seen_from(file, folder) for file in ([files] if isinstance(files, str) else files)]
        return self._fingerprint(path, files, self.tokenizer.fingerprint)

    def fingerprint_with(self, tokenizer: str) -> str:
        """Return the fingerprint, with another fingerprint of the tokenizer."""
        return self._fingerprint(self.arguments.path, self.arguments.data_files, tokenizer)

    def _fingerprint(self, path: str, data_files: str | list[str] | None, tokenizer: str) -> str:
        a = self.arguments
        source: dict = {"path": path, "name": a.name, "data_files": data_files, "split": a.split}
        source["text_column"] = a.text_column
        source |= {key: value for key in ("kind", "sample_by") if (value := getattr(a, key)) is not None}
        facts = [source, tokenizer, self.seq_len, self.seed, self.shuffle_buffer]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _blocks(self, epoch: int, number: int, source: dict | None) -> Iterator[_Block]:
        """Yield the blocks of the stream from block `number` of `epoch` on, whose position is `source`."""
        prefix, suffix = self.tokenizer.document_prefix, self.tokenizer.document_suffix
        tokens_in_epoch = -1 if source else 0  # unknown when the epoch began before this run
        self._text.left_out = LeftOut()
        while True:
            rows = self._text.start(epoch, source)
            while read := list(islice(rows, self.shuffle_buffer or BLOCK_DOCUMENTS)):
                texts = [document.text for document in read]
                if self.shuffle_buffer:
                    order = window_index(self.seed, (epoch << 32) + number, np.arange(len(texts)), len(texts))
                    texts = [texts[i] for i in order]
                encoded = self.tokenizer.encode_batch([text for text in texts if text])
                documents = [[*prefix, *ids, *suffix] for ids in encoded if ids]
                lengths = np.array([len(document) for document in documents], dtype=np.int64)
                tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
                left_out, self._text.left_out = self._text.left_out, LeftOut()
                for document in read:
                    if not document.text:
                        left_out.add("empty text", document.source)
                yield _Block(epoch, number, source, tokens, np.cumsum(lengths) - lengths, left_out)
                tokens_in_epoch = max(tokens_in_epoch, 0) + len(tokens) if documents else tokens_in_epoch
                number += 1
                source = self._text.state()
            if tokens_in_epoch == 0:
                raise UserError(f"empty corpus: {self.arguments.path!r} gives no tokens")
            epoch, number, source, tokens_in_epoch = epoch + 1, 0, None, 0

    def steps(self, state: dict | None, batching: Batching) -> Iterator[tuple[list[MicroBatch], dict, dict[str, list]]]:
        """Yield the steps from `state` on without end.

        A step is (micro-batches of the rank, the state after the step, what was left out until then). The state counts
        what was left out only of the blocks before its own, because that one is read again.
        """
        if state and state.get("reader", "datasets") != self._text.reader:  # Older checkpoints name no reader.
            self._text = open_stream(self.arguments, state.get("reader", "datasets"))
        state = state or {"samples": 0, "epoch": 0, "block": 0, "source": None, "offset": 0}
        blocks = self._blocks(state["epoch"], state["block"], state["source"])
        pending: deque[_Block] = deque()
        offset = state["offset"]  # start of the next sample in pending[0]
        sample = state["samples"]
        left_out = _LeftOutSoFar(state.get("left_out", {}))
        while True:
            batches = []
            for micro in range(batching.micro_batches):
                rows = []
                for _ in range(batching.micro_batch_size):
                    while sum(len(block.tokens) for block in pending) - offset < self.seq_len + 1:
                        pending.append(next(blocks))
                    if batching.is_own(micro):
                        rows.append(_cut(pending, offset, offset + self.seq_len + 1))
                    offset += self.seq_len
                    while offset >= len(pending[0].tokens):
                        left_out = left_out.plus([pending[0].left_out])
                        offset -= len(pending.popleft().tokens)
                if rows:
                    indices = np.arange(sample, sample + batching.micro_batch_size)
                    batches.append(build_micro_batch(rows, self.seq_len, indices, self.reset_at_document_boundaries))
                sample += batching.micro_batch_size
            first = pending[0]
            after = {"samples": sample, "epoch": first.epoch, "block": first.number, "source": first.source}
            after |= {"offset": offset} | ({"left_out": left_out.reasons} if left_out.reasons else {})
            after |= {} if self._text.reader == "datasets" else {"reader": self._text.reader}
            yield batches, after, left_out.plus(block.left_out for block in pending).reasons


class _LeftOutSoFar:
    """What was left out, which JSON can store.

    Attributes:
        reasons: reason -> [how often, where first].
    """

    def __init__(self, reasons: dict[str, list]):
        self.reasons = reasons

    def plus(self, more: Iterable[LeftOut]) -> "_LeftOutSoFar":
        reasons = dict(self.reasons)
        for left_out in more:
            for reason, count in left_out.counts.items():
                before, first = reasons.get(reason, (0, left_out.first[reason]))
                reasons[reason] = [before + count, first]
        return _LeftOutSoFar(reasons)


def _cut(blocks: deque[_Block], start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens `start` to `stop` of the joined blocks, and the positions in them at which documents start."""
    tokens, starts = [], []
    base = 0
    for block in blocks:
        tokens.append(block.tokens[max(start - base, 0) : max(stop - base, 0)])
        low, high = np.searchsorted(block.starts, [start - base, stop - base])
        starts.append(block.starts[low:high] + (base - start))
        base += len(block.tokens)
        if base >= stop:
            break
    return np.concatenate(tokens), np.concatenate(starts)


class StreamLoader(Prefetcher):
    """Iterate over the steps of one process from a stream, as `Loader` does from corpora.

    Args:
        data: the stream. It has one position, so only one loader at a time may read it.
        batching: batch sizes, and the place of this process among all.
        state: `stream_state` of an earlier loader, to continue from there, on any number of processes.
        pin_memory: return tensors in page-locked memory.
        prefetch: number of steps that are prepared ahead.

    Attributes:
        stream_state: the position after the last step taken from the loader (not the last one prepared), which JSON
            can store; None before the first step.
        left_out: what was left out of the stream until then: reason -> [how often, where first].
    """

    def __init__(
        self,
        data: StreamData,
        batching: Batching,
        state: dict | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        self.stream_state = state
        self.left_out: dict[str, list] = (state or {}).get("left_out", {})
        device = torch.cuda.current_device() if pin_memory else None

        def items() -> Iterator[tuple[list[MicroBatch], dict, dict[str, list]]]:
            set_thread_device(device)
            for batches, after, left_out in data.steps(state, batching):
                yield [batch.pin_memory() for batch in batches] if pin_memory else batches, after, left_out

        super().__init__(items(), prefetch)

    def __next__(self) -> list[MicroBatch]:
        batches, self.stream_state, self.left_out = super().__next__()
        return batches
