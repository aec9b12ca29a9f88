"""The optimizer: which parameters have weight decay, and AdamW over them."""

from typing import Any

import torch
from torch import nn

from lrnn.pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float, by_shape: bool = False) -> list[dict[str, Any]]:
    """Return two parameter groups: linear maps, with weight decay, and the other parameters, without.

    Linear maps are the weights of linear layers and embeddings, and the parameters that a module names in `matrices`.
    The others are biases, gates, norms, decays, scales, and the taps of the short convolutions.

    Args:
        model: its parameters are grouped, in their order.
        weight_decay: of the first group.
        by_shape: whether to tell linear maps by their two dimensions, for training that began before `matrices` was
            introduced. The gate biases of the mLSTM and the sLSTM have decay then, and the sLSTM's recurrent matrices
            have none.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if by_shape:
            is_map = parameter.ndim == 2 and "conv1d" not in name and last != "A_log"
        else:
            is_map = _is_linear_map(model.get_submodule(path), last)
        (decayed if is_map else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def has_other_groups_by_shape(model: nn.Module) -> bool:
    """Return whether `by_shape` changes the parameter groups of the model."""
    by_meaning, by_shape = (parameter_groups(model, 0.0, by_shape=old)[0]["params"] for old in (False, True))
    return [id(p) for p in by_meaning] != [id(p) for p in by_shape]


def _is_linear_map(module: nn.Module, name: str) -> bool:
    """Return whether a module's own parameter is a linear map."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return name == "weight"
    return name in getattr(module, "matrices", ())


def build_optimizer(groups: list[dict[str, Any]], settings: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW over parameter groups, fused on a GPU. The learning rate is set again before every step."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=device.type == "cuda",
    )
