"""Random integers as a pure function of (seed, sample index, field, counter), by splitmix64 in wrapping int64.

There is no generator state, so sample i is the same in any batch, in any order and on any device: torch multiplies,
adds and shifts int64 with wrap-around on CPU and on CUDA alike.
"""

from enum import IntEnum

import torch
from torch import Tensor

from lrnn.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_BITS = 2
MAX_INDEX = 2 ** (64 - SPLIT_BITS)
MAX_SEED = 2 ** (63 - SPLIT_BITS)


class Field(IntEnum):
    """The purpose of a random number. Each field has its own 2**32 counters, so draws are independent."""

    LENGTH = 0
    SYMBOL = 1
    OPERATOR = 2
    SPLIT = 3
    QUESTION = 4
    IS_OTHER = 5
    OTHER_SYMBOL = 6
    CONTINUES = 7


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit value."""
    return (value + 2**63) % 2**64 - 2**63


GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # `>>` repeats the sign bit of an int64. The mask turns it into the shift of an unsigned number.
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix64(x: Tensor) -> Tensor:
    """Apply the output function of splitmix64, a bijection of 64-bit words, to an int64 tensor of any shape."""
    x = (x ^ _shift_right(x, 30)) * MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def split_seed(seed: int, split: str) -> int:
    """Return the seed of a split: `seed` with the split in its two lowest bits, which `sample_keys` keeps apart."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; valid: {', '.join(SPLITS)}")
    if not 0 <= seed < MAX_SEED:
        raise UserError(f"the seed must be in 0..2**{63 - SPLIT_BITS} - 1, not {seed}")
    return (seed << SPLIT_BITS) | SPLITS.index(split)


def sample_keys(seed: int, indices: Tensor) -> Tensor:
    """Return a 64-bit key per sample, `[B]` int64, from a seed of `split_seed` and the sample indices, `[B]` int64.

    The two lowest bits of the seed select the quarter of the 64-bit range in which indices are counted, and the map
    from that range to keys is a bijection. Two samples of a user's seed, in the same split or not, never share a key.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed must be in 0..2**63 - 1, not {seed}")
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise UserError(f"sample indices must be int64 of shape [B], not {indices.dtype} of {list(indices.shape)}")
    if indices.numel() and (indices.min() < 0 or indices.max() >= MAX_INDEX):
        raise UserError(f"sample indices must be in 0..2**{64 - SPLIT_BITS} - 1")
    split = seed % 2**SPLIT_BITS
    base = mix64(torch.tensor(seed >> SPLIT_BITS, device=indices.device) + GAMMA)
    return mix64(base + GAMMA * (indices + _signed(split * MAX_INDEX)))


def words(keys: Tensor, field: Field, counters: Tensor | int) -> Tensor:
    """Return random 64-bit words, as int64, of the shape to which `keys` and `counters` (0 to 2**32 - 1) broadcast.

    Field 0 is the stream of splitmix64 that starts from the key.
    """
    counters = torch.as_tensor(counters, device=keys.device)  # Python's integers do not wrap around
    return mix64(keys + GAMMA * (counters + (int(field) << 32) + 1))


def integers(keys: Tensor, field: Field, counters: Tensor | int, bound: Tensor | int) -> Tensor:
    """Return random integers in 0..bound-1, int64, of the shape to which `keys`, `counters` and `bound` broadcast.

    They are a 63-bit word modulo the bound, so a probability is off by a factor of at most 1 + bound / 2**63. For
    bounds below a billion the relative bias is less than 1.1e-10.
    """
    return _shift_right(words(keys, field, counters), 1) % bound


def happens(keys: Tensor, field: Field, counters: Tensor | int, probability: float) -> Tensor:
    """Return whether events of a probability happen, bool, of the shape to which `keys` and `counters` broadcast."""
    return integers(keys, field, counters, 2**30) < probability * 2**30
