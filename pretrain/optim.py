"""The optimizer: which parameters have weight decay and which are Muon's, and AdamW or Muon over them."""

from typing import Any

import torch
from torch import Tensor, nn

from lrnn.pretrain.config import OptimConfig
from lrnn.pretrain.muon.matrices import Matrices, matrices_of
from lrnn.pretrain.muon.optimizer import MuonAdamW


def parameter_groups(
    model: nn.Module, weight_decay: float, by_shape: bool = False, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Return two parameter groups: linear maps, with weight decay, and the other parameters, without.

    Linear maps are the weights of linear layers and embeddings, and the parameters that a module names in `matrices`.
    The others are biases, gates, norms, decays, scales, and the taps of the short convolutions.

    Args:
        model: its parameters are grouped, in their order.
        weight_decay: of the first group.
        by_shape: whether to tell linear maps by their two dimensions, for training that began before `matrices` was
            introduced. The gate biases of the mLSTM and the sLSTM have decay then, and the sLSTM's recurrent matrices
            have none.
        decay_embeddings: whether the weights of embeddings are among the linear maps.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if by_shape:
            is_map = parameter.ndim == 2 and "conv1d" not in name and last != "A_log"
        else:
            is_map = _is_linear_map(model.get_submodule(path), last)
        if not decay_embeddings and isinstance(model.get_submodule(path), nn.Embedding):
            is_map = False
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


def build_optimizer(
    model: nn.Module,
    settings: OptimConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    by_shape: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer of a model. The learning rate is set again before every step.

    Args:
        model: the model, not yet partitioned.
        settings: the optimizer's settings.
        device: where the parameters are; AdamW is fused on a GPU.
        dtype: what Muon orthogonalizes matrices in.
        by_shape: see `parameter_groups`.
    """
    groups = parameter_groups(model, settings.weight_decay, by_shape, settings.decay_embeddings)
    adamw: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "fused": device.type == "cuda",
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    muon = settings.muon
    matrices = matrices_of(model, muon.per_head)
    return MuonAdamW(
        _with_matrices(groups, matrices, (muon.lr or settings.lr) / settings.lr),
        matrices,
        momentum=muon.momentum,
        nesterov=muon.nesterov,
        adjust_lr_fn=muon.adjust_lr_fn,
        dtype=dtype,
        **adamw,
    )


def _with_matrices(
    groups: list[dict[str, Any]], matrices: dict[Tensor, Matrices], lr_ratio: float
) -> list[dict[str, Any]]:
    """Return each group as two, the weights that are Muon's and the others, and no group without a parameter."""
    split = []
    for group in groups:
        own = [p for p in group["params"] if p in matrices]
        others = [p for p in group["params"] if p not in matrices]
        split += [{**group, "params": own, "matrices": True, "lr_ratio": lr_ratio}, {**group, "params": others}]
    return [group for group in split if group["params"]]
