"""SwiGLU, silu(gate) * up, in plain PyTorch. Copied into exported model folders."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors of one shape and dtype."""
    return F.silu(gate) * up
