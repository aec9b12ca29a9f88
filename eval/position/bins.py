"""Bins of position on a logarithmic scale, and a bootstrap over documents of the mean in each bin.

A token's position is the number of tokens before it, so it is at least 1. D documents, K bins, M models, R resamples.
"""

import numpy as np

INTERVAL = (0.025, 0.975)
BLOCK = 2**22  # numbers of a block of weights [resamples, D]: 32 MB


def log_edges(length: int, anchor: int, per_octave: int) -> np.ndarray:
    """Edges int64 [K + 1], ascending from 0 to `length`: bin k holds the positions edges[k] < p <= edges[k + 1].

    `anchor` is an edge where `length` reaches it: given the training length, no bin mixes positions that training
    had with others. From there the edges are 1 / `per_octave` octaves apart, or 1 where that is less.
    """
    down, up = np.ceil(np.log2(anchor)), np.ceil(max(np.log2(length / anchor), 0))
    octaves = np.arange(-down * per_octave, up * per_octave + 1) / per_octave
    inner = np.rint(anchor * 2.0**octaves).astype(np.int64)
    return np.unique(np.concatenate([[0], inner[(inner > 0) & (inner < length)], [length]]))


def bin_of(positions: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin, 0 to K - 1, of each position (1 to edges[-1])."""
    return np.searchsorted(edges, positions, side="left") - 1


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means by bin of documents drawn anew with replacement: float64 [M, R, K].

    All models see the same draws, so a difference of two rows of the result is that of a paired bootstrap. NaN: in bins
    that fewer than two documents reach or whose sums are not finite, and in draws without a document that reaches it.

    Args:
        sums: float64 [M, D, K], of a model's values over the tokens of a document in a bin.
        counts: int64 [D, K], how many tokens those are.
    """
    models, documents, bins = sums.shape
    rng = np.random.default_rng(seed)
    means = np.empty((models, resamples, bins))
    block = max(1, BLOCK // documents)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, resamples, block):
            rows = min(block, resamples - start)
            # How often each document is drawn.
            weights = rng.multinomial(documents, np.full(documents, 1 / documents), size=rows).astype(np.float64)
            means[:, start : start + rows] = (weights @ sums) / (weights @ counts)
    means[:, :, (counts > 0).sum(0) < 2] = np.nan  # a single document would give a band without width
    return np.where(np.isfinite(sums).all(1)[:, None], means, np.nan)


def interval(draws: np.ndarray) -> np.ndarray:
    """95% percentile interval of draws [R, K]: [2, K], low and high; NaN where every draw is."""
    result = np.full((2, draws.shape[1]), np.nan)
    some = ~np.isnan(draws).all(0)
    result[:, some] = np.nanquantile(draws[:, some], INTERVAL, axis=0)
    return result
