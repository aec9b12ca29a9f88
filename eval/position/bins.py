"""Bins of position on a logarithmic scale.

A token's position is the number of tokens before it, so it is at least 1. There are K bins.
"""

import numpy as np


def log_edges(length: int, anchor: int, per_octave: int) -> np.ndarray:
    """Return edges int64 [K + 1], ascending from 0 to `length`: bin k holds the positions edges[k] < p <= edges[k + 1].

    The edges are 1 / `per_octave` octaves apart, counted from `anchor`, or 1 position where that is less. `anchor`
    itself is an edge if `length` reaches it: with the training length as anchor, no bin mixes positions seen in
    training with others.
    """
    down, up = np.ceil(np.log2(anchor)), np.ceil(max(np.log2(length / anchor), 0))
    octaves = np.arange(-down * per_octave, up * per_octave + 1) / per_octave
    inner = np.rint(anchor * 2.0**octaves).astype(np.int64)
    return np.unique(np.concatenate([[0], inner[(inner > 0) & (inner < length)], [length]]))


def bin_of(positions: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin, 0 to K - 1, of each position (1 to edges[-1])."""
    return np.searchsorted(edges, positions, side="left") - 1
