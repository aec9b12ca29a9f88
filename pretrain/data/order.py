"""The order of the samples: pure functions of the seed and a sample's number give its corpus and window, without state.

A run's samples are numbered 0, 1, 2, ... over its whole life. The position in the data is therefore one number, which
means the same on any number of processes.
"""

from collections.abc import Sequence

import numpy as np

from lrnn.errors import UserError

BLOCK = 4096  # samples within which several corpora are mixed
_ROUNDS = 6
_U64 = np.uint64


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64, a bijection of uint64 in which every input bit affects every output bit."""
    # The arithmetic is modulo 2**64; numpy warns about it for scalars only.
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _key(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers, or 1-d arrays of them that broadcast, to a 1-d uint64 array."""
    key = np.zeros(1, dtype=_U64)
    for part in parts:
        # Without the constant, zeros would hash to zero.
        key = _mix((key ^ np.atleast_1d(part).astype(_U64)) + _U64(0x9E3779B97F4A7C15))
    return key


def window_index(seed: int, epoch: int | np.ndarray, i: int | np.ndarray, n: int) -> np.ndarray:
    """Return the i-th element of a pseudo-random permutation of `range(n)`, one per (seed, epoch), in O(1) memory.

    A Feistel network permutes the numbers below a power of four. A result of n or more passes through it again until it
    is below n ("cycle walking"), which takes at most 4 passes on average.

    Args:
        seed: at least 0.
        epoch, i: integers or arrays of them that broadcast; `0 <= i < n`.
        n: at least 1, at most 2**62.

    Returns:
        int64 array of the broadcast shape, each in `range(n)`.
    """
    i, epoch = np.broadcast_arrays(np.asarray(i, dtype=np.int64), np.asarray(epoch, dtype=np.int64))
    assert n >= 1 and (i.size == 0 or (i.min() >= 0 and i.max() < n))
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    bits, mask = _U64(half), _U64((1 << half) - 1)
    result = i.astype(_U64).ravel()
    key = _key(seed, epoch.ravel())
    todo = np.arange(result.size)
    while todo.size:
        x = result[todo]
        left, right = x >> bits, x & mask
        for r in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ (key[todo] + _U64(r << 56))) & mask)
        x = (left << bits) | right
        result[todo] = x
        todo = todo[x >= _U64(n)]
    return result.astype(np.int64).reshape(i.shape)


class MixedOrder:
    """The order of the samples of several corpora, mixed by weight.

    After any whole number of blocks of `BLOCK` samples, each corpus has given its exact share of all samples so far to
    within one sample; the order inside a block is random. The k-th sample of a corpus of n windows is window `k % n`
    of the permutation of its epoch `k // n`: every window comes once before any comes again.

    Args:
        num_windows: number of windows of each corpus, at least 1.
        weights: share of the samples that each corpus gives, relative to the others.
        seed: at least 0.
        keys: of each corpus the number that its permutations depend on; default 0, 1, ...
        offsets: number of the first sample of each corpus; default 0.

    Raises:
        UserError: a weight is not positive, or so small that its corpus would not appear in every block.
    """

    def __init__(
        self,
        num_windows: Sequence[int],
        weights: Sequence[float],
        seed: int,
        keys: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ):
        assert len(num_windows) == len(weights) >= 1 and min(num_windows) >= 1
        if not (np.isfinite(weights).all() and min(weights) > 0):
            raise UserError(f"corpus weights {list(weights)}: every one has to be a positive number")
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
        if shares.min() < 2 / BLOCK:  # 1 / BLOCK would be enough without rounding.
            raise UserError(
                f"corpus weights {list(weights)}: the smallest is {shares.min():.2g} of the whole, "
                f"below 1/{BLOCK // 2}; give it more, or leave that corpus out"
            )
        self._num_windows = np.asarray(num_windows, dtype=np.int64)
        self._edges = np.concatenate([[0.0], np.cumsum(shares)[:-1], [1.0]])
        self._seed = seed
        self._keys = list(keys or range(len(num_windows)))
        self._offsets = np.asarray(offsets or [0] * len(num_windows), dtype=np.int64)

    def _before(self, block: np.ndarray) -> np.ndarray:
        """Return the number of samples that each corpus gives before a block: [..., corpora]."""
        # Cumulative shares are rounded, not shares, so that the counts of all corpora add up. A corpus's count never
        # falls from one block to the next, because its share of a block is at least one sample.
        edges = np.floor(block[..., None] * (BLOCK * self._edges) + 0.5).astype(np.int64)
        return np.diff(edges, axis=-1)

    def counts(self, samples: int) -> np.ndarray:
        """Return how many of the first `samples` samples each corpus gives: int64 [corpora]."""
        if len(self._num_windows) == 1:
            return np.array([samples], dtype=np.int64)
        block = samples // BLOCK
        corpus, _, _ = self(np.arange(block * BLOCK, samples))
        return self._before(np.array(block)) + np.bincount(corpus, minlength=len(self._num_windows))

    def reserved(self, samples: int) -> np.ndarray:
        """Return how many of its samples each corpus has to go beyond for new ones after `samples` samples: [corpora].

        A block that is not finished counts as a whole one, because its samples are in random order.
        """
        if len(self._num_windows) == 1:
            return np.array([samples], dtype=np.int64)
        return self._before(np.array(-(-samples // BLOCK)))

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (corpus, epoch, window) of `samples` (1-d int64): three int64 arrays of the same shape."""
        samples = np.asarray(samples, dtype=np.int64)
        if len(self._num_windows) == 1:
            corpus, number = np.zeros_like(samples), samples
        else:
            block, slot = np.divmod(samples, BLOCK)
            slot = window_index(_seed_of_mix(self._seed), block, slot, BLOCK)
            before = self._before(block)
            ends = np.cumsum(self._before(block + 1) - before, axis=-1)
            corpus = (slot[..., None] >= ends).sum(axis=-1)
            rows = np.arange(len(samples))
            first = np.where(corpus > 0, ends[rows, corpus - 1], 0)
            number = before[rows, corpus] + slot - first
        epoch, within = np.divmod(number + self._offsets[corpus], self._num_windows[corpus])
        window = np.empty_like(samples)
        for c, n in enumerate(self._num_windows):
            chosen = np.flatnonzero(corpus == c)
            window[chosen] = window_index(
                int(_key(self._seed, self._keys[c])[0]), epoch[chosen], within[chosen], int(n)
            )
        return corpus, epoch, window


def _seed_of_mix(seed: int) -> int:
    """Return a separate seed for the order inside a block."""
    return int(_key(seed, 1 << 32)[0])
