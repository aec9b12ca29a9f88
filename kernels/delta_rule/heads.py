"""Heads of any size up to 256 as the kernels of the delta rule take them, padded with zeros.

Kernels hold all of a key, whose size is a power of 2 for that: 64, 128 or 256. Values are cut into columns of 64, so
they take any multiple of 64. Zeros in q and k add nothing to norms and products, and their rows of the state stay zero.
So do columns of v.
"""

import torch.nn.functional as F
from torch import Tensor

from lrnn.kernels.common.constants import HEAD_SIZES

COLUMNS = 64  # of values


def check_sizes(K: int, V: int) -> None:
    """Raise ValueError if the kernels do not take keys of size K and values of size V."""
    if max(K, V) > HEAD_SIZES[-1]:
        raise ValueError(f"the kernels support head sizes up to {HEAD_SIZES[-1]}; got {K} for keys and {V} for values")


def padded_sizes(K: int, V: int) -> tuple[int, int]:
    """Return the sizes that the kernels compute keys of size K and values of size V with; see also `check_sizes`."""
    check_sizes(K, V)
    return next(size for size in HEAD_SIZES if size >= K), -(-V // COLUMNS) * COLUMNS


def pad_heads(x: Tensor, size: int) -> Tensor:
    """Return x [..., D] with zeros up to the size, x itself if that is D."""
    more = size - x.shape[-1]
    return F.pad(x, (0, more)) if more else x
