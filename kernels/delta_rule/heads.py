"""Heads of any size up to 256 as the kernels of the delta rule take them: padded with zeros to 64, 128 or 256.

Zeros in q and k add nothing to norms and products, and their rows of the state stay zero. So do columns of v.
"""

import torch.nn.functional as F
from torch import Tensor

from lrnn.kernels.common.constants import HEAD_SIZES


def check_sizes(K: int, V: int) -> None:
    """Raise ValueError if the kernels do not take keys of size K and values of size V."""
    if max(K, V) > HEAD_SIZES[-1]:
        raise ValueError(f"the kernels support head sizes up to {HEAD_SIZES[-1]}; got {K} for keys and {V} for values")


def padded_size(size: int) -> int:
    """Return the size that the kernels compute heads of `size` with, which is at most 256."""
    return next(supported for supported in HEAD_SIZES if supported >= size)


def pad_heads(x: Tensor) -> Tensor:
    """Return x [..., D] with zeros up to the size that the kernels take, x itself if that is D."""
    more = padded_size(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, more)) if more else x
