"""RMS norm over the last dimension, in plain PyTorch. Copied into exported model folders."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * weight over the last dimension of x [..., D] in the dtype of x.

    It is computed in float32, and in float64 for float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
