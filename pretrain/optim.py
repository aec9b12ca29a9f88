"""The optimizer: which parameters have weight decay, and AdamW over them."""

from typing import Any

import torch
from torch import nn

from lrnn.pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices, with weight decay, and the other parameters, without.

    The others are norms, `A_log`, `dt_bias`, all vectors and the taps of the short convolutions.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # Mamba's A_log has two dimensions and is no linear map.
        is_matrix = parameter.ndim == 2 and "conv1d" not in name and not name.endswith("A_log")
        (decayed if is_matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, settings: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over the model's parameters, fused on a GPU. The learning rate is set again before every step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=device.type == "cuda",
    )
