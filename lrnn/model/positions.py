"""Positions of tokens, and the angles of rotary positions in float32. Copied into exported folders."""

from typing import Any

import torch
from torch import Tensor

from .rope_scaling import scaled_frequencies


def positions(x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None, document: Tensor | None) -> Tensor:
    """Return the position of each token in its sequence or document, int64 [1 or B, T].

    Args:
        x: [B, T, ...], with padding behind the tokens of each row.
        start: int64 [B], tokens of each row ahead of x, or None if there are none. They belong to the first document of
            the row.
        cu_seqlens, document: packed documents, as `Mixer.forward` is given them, or None.
    """
    B, T = x.shape[:2]
    if cu_seqlens is None or document is None:
        position = torch.arange(T, device=x.device)[None]
        return position if start is None else start[:, None] + position
    flat = torch.arange(B * T, device=x.device).view(B, T)
    position = flat - cu_seqlens.long()[document - 1]  # documents are counted from 1
    return position if start is None else position + start[:, None] * (document == document[:, :1])


def turns(position: Tensor, size: int, base: float, scaling: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of position / base^(2i/size), float32 [1 or B, T, 1, size/2].

    Args:
        position: int64 [1 or B, T].
        size: of a head.
        base: theta in the configurations of models.
        scaling: changes the angles, and may multiply cosines and sines, see `rope_scaling.py`; None for neither.
    """
    if scaling is not None:
        frequencies, factor = scaled_frequencies(size, base, scaling, position.device)
        angle = position[..., None, None].float() * frequencies
        return angle.cos() * factor, angle.sin() * factor
    channel = torch.arange(0, size, 2, device=position.device, dtype=torch.float32)
    angle = position[..., None, None].float() * base ** (-channel / size)
    return angle.cos(), angle.sin()
