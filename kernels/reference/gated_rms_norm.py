"""RMS norm over the last dimension times a SiLU gate, in plain PyTorch.

    r = rsqrt(mean(x^2) + eps)       y = r x weight silu(gate)

The kernels of `lrnn/kernels/gated_rms_norm.py` are tested against it. The file depends on torch alone: it is copied
into exported model folders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Return rms_norm(x) * weight * silu(gate) over the last dimension, computed in float32 (float64 for float64).

    Args:
        x: [..., D], any float dtype.
        gate: [..., D], any float dtype, or None for the plain norm.
        weight: [D], any float dtype.
        eps: added to the mean square.

    Returns:
        A tensor of the shape of x in the dtype of gate, or of x without a gate.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    if gate is None:
        return y.to(x.dtype)
    return (y * F.silu(gate.to(dtype))).to(gate.dtype)
