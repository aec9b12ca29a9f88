"""Samples of corpora: a pure function of their numbers."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from lrnn.errors import UserError
from lrnn.pretrain.corpus.block_reader import CorruptData
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.chains import Chains
from lrnn.pretrain.data.micro_batch import MicroBatch, build_micro_batch
from lrnn.pretrain.data.order import MixedOrder


class CorpusData:
    """Samples of corpora, mixed by weight.

    Args:
        corpora: train splits.
        weights: relative share of the samples that each corpus gives.
        seq_len: tokens per sample.
        seed: seed of the order.
        reset_at_document_boundaries: whether to set `cu_seqlens`.
        chains: which samples follow one another in a row, or None if all are apart.
        keys, offsets: see `MixedOrder`.

    Attributes:
        num_windows: number of windows of all corpora together.

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
        chains: Chains | None = None,
        keys: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ):
        self.corpora = list(corpora)
        self.weights = list(weights)
        self.seq_len = seq_len
        self.seed = seed
        self.reset_at_document_boundaries = reset_at_document_boundaries
        self.chains = chains
        per_item = 1 if chains is None else chains.length  # of the order, which is of windows or of chains
        self._windows = [num_windows(corpus, seq_len) // per_item for corpus in corpora]
        self.num_windows = sum(self._windows) * per_item
        self._order = MixedOrder(self._windows, weights, seed, keys, offsets)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the corpus and the window of samples `indices`.

        Args:
            indices: [n] int64. The cost per sample is small when n is large.

        Returns:
            Two [n] int64 arrays.
        """
        if self.chains is None:
            corpus, _, window = self._order(indices)
            return corpus, window
        chain, place = self.chains.locate(indices)
        corpus, _, number = self._order(chain)
        return corpus, number * self.chains.length + place

    def epochs(self, samples: int) -> list[float]:
        """Return how often each corpus was gone through after `samples` samples, such as 1.5."""
        counts = self._order.counts(samples) if self.chains is None else self._chains_read(self.chains, samples)
        return [float(n / windows) for n, windows in zip(counts, self._windows, strict=True)]

    def _chains_read(self, chains: Chains, samples: int) -> np.ndarray:
        """Return how many chains of each corpus `samples` samples are, with parts of those that are not finished."""
        turn, rest = divmod(samples, chains.rows * chains.length)
        before, after = (self._order.counts(n * chains.rows) for n in (turn, turn + 1))
        return before + (after - before) * (rest / (chains.rows * chains.length))

    def reserved(self, samples: int) -> list[int]:
        """Return how many of its samples each corpus has to go beyond for new ones, see `MixedOrder.reserved`."""
        return self._order.reserved(samples).tolist()

    def gather(self, corpus: np.ndarray, window: np.ndarray, indices: np.ndarray) -> MicroBatch:
        """Return the micro-batch of samples `indices`, which `locate` found at (corpus, window); all [B] int64.

        Raises:
            CorruptData: a sample cannot be read as it was written; the message names the samples too.
        """
        try:
            rows = [
                read_window(self.corpora[c], w, self.seq_len)
                for c, w in zip(corpus.tolist(), window.tolist(), strict=True)
            ]
        except CorruptData as error:
            raise CorruptData(f"{error} (while reading samples {_ranges(indices)})") from error
        batch = build_micro_batch(rows, self.seq_len, indices, self.reset_at_document_boundaries)
        if self.chains is not None:
            _, place = self.chains.locate(indices)
            batch.continues = torch.from_numpy((place > 0) & ~self._begin_documents(rows))
        return batch

    def _begin_documents(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return which rows begin with a document that resets the state."""
        resets = self.reset_at_document_boundaries
        return np.array([resets and starts.size > 0 and starts[0] == 0 for _, starts in rows])

    def batch(self, indices: np.ndarray) -> MicroBatch:
        """Return the micro-batch of samples `indices` ([B] int64)."""
        return self.gather(*self.locate(indices), indices)

    @property
    def fingerprint(self) -> str:
        """Return a sha256 of everything that decides the tokens of a sample; a run can resume if it is the same."""
        facts = [[corpus.fingerprint for corpus in self.corpora], self.weights, self.seq_len, self.seed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_window(corpus: TokenCorpus, window: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a window ([seq_len + 1]) and the positions in them at which a document starts."""
    start = window * seq_len
    stop = start + seq_len + 1
    return corpus.tokens(start, stop), corpus.document_starts(start, stop) - start


def num_windows(corpus: TokenCorpus, seq_len: int) -> int:
    """Return the number of windows of `seq_len` inputs (and a last label) in a corpus.

    Raises:
        UserError: there is none.
    """
    windows = (corpus.num_tokens - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"corpus {corpus.path}: split {corpus.split!r} has {corpus.num_tokens} tokens, too few for one sample of "
            f"seq_len={seq_len} (which takes {seq_len + 1}); shorten seq_len or add text"
        )
    return windows


def check_enough_samples(data: CorpusData, world_size: int) -> None:
    """Raise UserError if there are more processes than samples."""
    if data.num_windows < world_size:
        raise UserError(
            f"{world_size} processes, but the corpora have only {data.num_windows} samples of "
            f"seq_len={data.seq_len}; use fewer processes, a shorter seq_len or more text"
        )


def _ranges(indices: np.ndarray) -> str:
    """Format `indices` ([n] int64) for a message, with consecutive ones as "first..last"."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
