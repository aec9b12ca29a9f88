"""Which samples follow one another in a row of the batch when states are passed on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrnn.errors import UserError
from lrnn.pretrain.corpus.reader import TokenCorpus


@dataclass(frozen=True)
class Chains:
    """Chains of consecutive samples of a corpus, which a row of the global batch reads one after the other.

    Chains are numbered and mixed as samples are without state passing. Sample n is in row n % rows. Of every
    `rows * length` samples each row has one chain, so that all rows begin and end their chains together.

    Args:
        rows: samples per step, over all processes.
        length: samples per chain.
    """

    rows: int
    length: int

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the chain of each sample, and its place in the chain, from 0: two int64 arrays."""
        step, row = np.divmod(samples, self.rows)
        turn, place = np.divmod(step, self.length)
        return turn * self.rows + row, place


def choose_chains(
    state_passing: bool | int, corpora: Sequence[TokenCorpus], seq_len: int, global_batch_size: int
) -> Chains | None:
    """Return the chains of a run, or None without state passing.

    Args:
        state_passing: samples per chain; True for the most with which every row has a chain of every corpus.
        corpora: train splits.
        seq_len: tokens per sample.
        global_batch_size: samples per step, over all processes.

    Raises:
        UserError: a corpus has too few tokens for such chains.
    """
    if state_passing is False:
        return None
    smallest = min(corpora, key=lambda corpus: corpus.num_tokens)
    samples = (smallest.num_tokens - 1) // seq_len
    length = samples // global_batch_size if state_passing is True else state_passing
    if length < 2 or length > samples:
        needed = f"{2 * global_batch_size:,}, 2 for each row of the batch" if state_passing is True else f"{length:,}"
        raise UserError(
            f"data.state_passing={str(state_passing).lower()}: corpus {smallest.path} has only {samples:,} samples of "
            f"seq_len={seq_len}, and at least {needed}, are needed; give data.state_passing a smaller number, shorten "
            "seq_len, or add text"
        )
    return Chains(global_batch_size, length)
