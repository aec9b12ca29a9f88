"""Rotation of pairs of channels, in plain PyTorch.

The file depends on torch alone: it is copied into exported model folders.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with each pair of channels (i, i + D/2) rotated by its angle, computed in float32 or wider.

    Args:
        x: [B, T, H, D].
        cos, sin: float32 [1 or B, T, 1, D/2], cosines and sines of the angles.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
