"""Samples as batches of tensors, prepared ahead of the training step by a thread."""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.corpus.block_reader import CorruptData
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.order import MixedOrder

IGNORED = -100  # the label that the loss leaves out
LOCATE_SAMPLES = 1024  # whose place in the corpora is computed at once


@dataclass
class MicroBatch:
    """Samples of one forward pass.

    Attributes:
        input_ids: [B, L] int64.
        labels: [B, L] int64, the next token of each position; -100 where that token is the first of another document.
        cu_seqlens: [N + 1] int32, where documents start in the flattened B * L tokens, and B * L; a row's start
            counts as one. None unless the state is to be reset at document boundaries.
        sample_indices: [B] int64, the samples' numbers in the run; -1 for a row that only fills up a batch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None
    sample_indices: torch.Tensor

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which a copy to the GPU runs beside computation."""
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.pin_memory()
        return MicroBatch(
            self.input_ids.pin_memory(), self.labels.pin_memory(), cu_seqlens, self.sample_indices.pin_memory()
        )


def model_inputs(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch as arguments of the model, on its device."""
    tensors = {"input_ids": batch.input_ids, "shift_labels": batch.labels}
    if batch.cu_seqlens is not None:
        tensors["cu_seqlens"] = batch.cu_seqlens
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def num_windows(corpus: TokenCorpus, seq_len: int) -> int:
    """Windows of `seq_len` inputs (and a last label) in a corpus. Raises UserError if there is none."""
    windows = (corpus.num_tokens - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"corpus {corpus.path}: split {corpus.split!r} has {corpus.num_tokens} tokens, too few for one sample of "
            f"seq_len={seq_len} (which takes {seq_len + 1}); shorten seq_len or add text"
        )
    return windows


def build_micro_batch(
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    seq_len: int,
    sample_indices: np.ndarray,
    reset_at_document_boundaries: bool,
) -> MicroBatch:
    """Make a batch of rows (tokens [seq_len + 1], positions in them at which a document starts, ascending)."""
    input_ids = torch.empty(len(rows), seq_len, dtype=torch.int64)
    labels = torch.empty(len(rows), seq_len, dtype=torch.int64)
    inputs_np, labels_np = input_ids.numpy(), labels.numpy()
    boundaries: list[np.ndarray] = []
    for row, (tokens, starts) in enumerate(rows):
        inputs_np[row] = tokens[:-1]
        labels_np[row] = tokens[1:]
        inner = starts[starts.searchsorted(1) :]
        labels_np[row, inner - 1] = IGNORED
        if reset_at_document_boundaries:
            boundaries.append(np.array([row * seq_len]))
            boundaries.append(inner[: inner.searchsorted(seq_len)] + row * seq_len)
    cu_seqlens = None
    if reset_at_document_boundaries:
        boundaries.append(np.array([len(rows) * seq_len]))
        cu_seqlens = torch.from_numpy(np.concatenate(boundaries).astype(np.int32))
    return MicroBatch(input_ids, labels, cu_seqlens, torch.from_numpy(np.asarray(sample_indices, dtype=np.int64)))


def _ranges(indices: np.ndarray) -> str:
    """`indices` ([n] int64) for a message, with consecutive ones as "first..last"."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


class CorpusData:
    """Samples of corpora mixed by weight: a pure function of their numbers.

    Args:
        corpora: train splits.
        weights: relative share of the samples that each corpus gives.
        seq_len: tokens of a sample.
        seed: of the order.
        reset_at_document_boundaries: give `cu_seqlens`.

    Attributes:
        num_windows: windows of all corpora together.

    Raises:
        UserError: a corpus is smaller than one sample; see also `MixedOrder`.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        weights: Sequence[float],
        seq_len: int,
        seed: int,
        reset_at_document_boundaries: bool = False,
    ):
        self.corpora = list(corpora)
        self.weights = list(weights)
        self.seq_len = seq_len
        self.seed = seed
        self.reset_at_document_boundaries = reset_at_document_boundaries
        windows = [num_windows(corpus, seq_len) for corpus in corpora]
        self.num_windows = sum(windows)
        self._order = MixedOrder(windows, weights, seed)

    def _window(self, corpus: TokenCorpus, window: int) -> tuple[np.ndarray, np.ndarray]:
        start = window * self.seq_len
        stop = start + self.seq_len + 1
        return corpus.tokens(start, stop), corpus.document_starts(start, stop) - start

    def sample_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of samples `indices` ([B] int64): [B, seq_len + 1] int64, inputs and the last label."""
        corpus, window = self.locate(indices)
        rows = [self._window(self.corpora[c], w)[0] for c, w in zip(corpus.tolist(), window.tolist(), strict=True)]
        return np.stack(rows).astype(np.int64)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, window) of samples `indices` ([n] int64): two [n] int64 arrays. Cheap a sample when n is large."""
        corpus, _, window = self._order(indices)
        return corpus, window

    def gather(self, corpus: np.ndarray, window: np.ndarray, indices: np.ndarray) -> MicroBatch:
        """The micro-batch of samples `indices` that `locate` found at (corpus, window); all [B] int64.

        Raises:
            CorruptData: a sample cannot be read as it was written; the message names the samples too.
        """
        try:
            rows = [self._window(self.corpora[c], w) for c, w in zip(corpus.tolist(), window.tolist(), strict=True)]
        except CorruptData as error:
            raise CorruptData(f"{error} (while reading samples {_ranges(indices)})") from error
        return build_micro_batch(rows, self.seq_len, indices, self.reset_at_document_boundaries)

    def batch(self, indices: np.ndarray) -> MicroBatch:
        """The micro-batch of samples `indices` ([B] int64)."""
        return self.gather(*self.locate(indices), indices)

    @property
    def fingerprint(self) -> str:
        """sha256 over all that decides which tokens a sample is; a run can resume where it is the same."""
        facts = [[corpus.fingerprint for corpus in self.corpora], self.weights, self.seq_len, self.seed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of one process in a step.

    Raises:
        UserError: there are fewer samples than processes could take, or the numbers do not divide.
    """
    return Batching(global_batch_size, micro_batch_size, 0, world_size).accumulation_steps


def check_enough_samples(data: CorpusData, world_size: int) -> None:
    """Raises UserError where there are more processes than samples."""
    if data.num_windows < world_size:
        raise UserError(
            f"{world_size} processes, but the corpora have only {data.num_windows} samples of "
            f"seq_len={data.seq_len}; use fewer processes, a shorter seq_len or more text"
        )


def set_thread_device(device: int | None) -> None:
    """Make `device` that of the calling thread: pinning memory in a new thread would else open a context on GPU 0."""
    if device is not None:
        torch.cuda.set_device(device)


class Prefetcher:
    """Runs an iterator ahead in a thread.

    An exception of the iterator is raised in the consumer, where its item would have come. `close` (or leaving the
    `with` block) stops the thread; the iterator is then at most `depth` + 1 items ahead.

    Args:
        items: what to iterate over; its `next` is only called in the thread.
        depth: items prepared ahead.
    """

    _END = object()

    def __init__(self, items: Iterator[Any], depth: int):
        self._items = items
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._wait_s = 0.0
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:  # handed over, not swallowed
            self._put((self._END, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item, error = self._queue.get()
        self._wait_s += time.perf_counter() - start
        if item is self._END:
            self.close()
            if error is not None:
                raise error
            raise StopIteration
        return item

    def take_wait_s(self) -> float:
        """Seconds that the consumer has waited for items since the last call."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def close(self) -> None:
        """Stop the thread. Safe to call twice."""
        self._closed.set()
        self._thread.join(timeout=10)  # it may hang in a network read; it ends with the process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Loader(Prefetcher):
    """The steps of one process: each item is the list of its micro-batches of a step, without end.

    Step s takes samples `s * global_batch_size` onwards, cut into micro-batches of consecutive samples; micro-batch m
    goes to rank `m % world_size`. So what is in a micro-batch does not depend on the number of processes.

    Args:
        data: the samples.
        global_batch_size: samples of a step, over all processes.
        micro_batch_size: samples of a micro-batch.
        rank, world_size: of this process, and how many there are.
        start_sample: samples already consumed by the run.
        pin_memory: give tensors in page-locked memory.
        prefetch: steps prepared ahead.

    Raises:
        UserError: the sizes do not divide, or there are more processes than samples.
    """

    stream_state: dict | None = None  # what a `StreamLoader` needs to go on; here the number of samples is enough

    def __init__(
        self,
        data: CorpusData,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        accumulation_steps(global_batch_size, micro_batch_size, world_size)
        check_enough_samples(data, world_size)
        assert 0 <= rank < world_size
        device = torch.cuda.current_device() if pin_memory else None

        def steps() -> Iterator[list[MicroBatch]]:
            set_thread_device(device)
            # The order is found for many samples at once: for a few the overhead of numpy would exceed all the rest.
            ahead = max(1, LOCATE_SAMPLES * world_size // global_batch_size)  # steps
            first = start_sample
            while True:
                stop = first + ahead * global_batch_size
                numbers = np.arange(first, stop, dtype=np.int64).reshape(ahead, -1, micro_batch_size)
                indices = numbers[:, rank::world_size]
                corpus, window = (found.reshape(indices.shape) for found in data.locate(indices.ravel()))
                for step in range(ahead):
                    batches = list(map(data.gather, corpus[step], window[step], indices[step]))
                    yield [batch.pin_memory() for batch in batches] if pin_memory else batches
                first = stop

        super().__init__(steps(), prefetch)


def heldout_batches(
    corpora: Sequence[TokenCorpus],
    seq_len: int,
    micro_batch_size: int,
    max_batches: int,
    rank: int = 0,
    world_size: int = 1,
    reset_at_document_boundaries: bool = False,
) -> Iterator[MicroBatch]:
    """The batches of one process to measure a held-out loss on: always the same windows, on any number of processes.

    They are the first windows of the corpora in turn, `max_batches * micro_batch_size` of them over all processes, or
    all there are. Every process gets the same number of batches; what is missing is filled up with rows whose labels
    are all -100. `sample_indices` number the windows.

    Args:
        corpora: held-out splits.
        max_batches: micro-batches at most, over all processes.

    Raises:
        UserError: a corpus is smaller than one sample.
    """
    wanted = max_batches * micro_batch_size
    counts = [num_windows(corpus, seq_len) for corpus in corpora]
    chosen = sorted((w, c) for c, count in enumerate(counts) for w in range(min(count, wanted)))[:wanted]
    per_rank = -(-len(chosen) // (micro_batch_size * world_size))

    def batches() -> Iterator[MicroBatch]:
        for turn in range(per_rank):
            first = (turn * world_size + rank) * micro_batch_size
            numbers = [i if i < len(chosen) else -1 for i in range(first, first + micro_batch_size)]
            rows = []
            for window, corpus in (chosen[max(i, 0)] for i in numbers):
                start = window * seq_len
                stop = start + seq_len + 1
                rows.append((corpora[corpus].tokens(start, stop), corpora[corpus].document_starts(start, stop) - start))
            batch = build_micro_batch(rows, seq_len, np.array(numbers), reset_at_document_boundaries)
            batch.labels[batch.sample_indices < 0] = IGNORED
            yield batch

    return batches()
