"""Decide whether a run trains with fused layers, and whether it can."""

import torch

from lrnn.errors import UserError
from lrnn.kernels.common.dispatch import INTERPRETED
from lrnn.pretrain.config import Config

FLOAT8_CAPABILITY = (8, 9)  # that of the first GPUs with products in float8
Card = tuple[str, tuple[int, int]]  # name and compute capability of a GPU


def uses_fused_layers(config: Config, device: torch.device, dtype: torch.dtype, card: Card | None = None) -> bool:
    """Return whether a run trains with fused layers.

    Args:
        config: the run's configuration.
        device: where the run computes.
        dtype: what modules compute in.
        card: the GPU, which need not be there; default that of `device`.

    Raises:
        UserError: the configuration asks for fused layers on a CPU, or for what only they, or another GPU, can do.
    """
    fused = config.fused_layers
    if fused is None:
        fused = device.type == "cuda" and dtype == torch.bfloat16
    elif fused and not (device.type == "cuda" or INTERPRETED):
        raise UserError("fused_layers is true, but they run on GPUs alone, and there is none; set it to null or false")
    if config.activation_checkpointing == "mlp" and not fused:
        raise UserError(
            "activation_checkpointing is 'mlp', which only fused layers can do, on a GPU; set it to 'full' or 'none'"
        )
    if config.precision == "fp8":
        _check_float8(fused, device, dtype, card)
    return fused


def _check_float8(fused: bool, device: torch.device, dtype: torch.dtype, card: Card | None) -> None:
    """Raise UserError if the GPU has no products in float8, or the layers do not compute so."""
    if not fused or dtype != torch.bfloat16:
        raise UserError(
            "precision is 'fp8', which takes a GPU and fused layers on bfloat16 autocast; here the device is "
            f"{device.type}, layers are {'fused' if fused else 'plain'}, and modules compute in {str(dtype)[6:]}. "
            "Set precision to bfloat16, or fused_layers to null"
        )
    if card is None and device.type == "cuda":
        card = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if card is not None and card[1] < FLOAT8_CAPABILITY:
        name, (major, minor) = card
        raise UserError(
            f"precision is 'fp8', which takes compute capability 8.9 or above; {name} has {major}.{minor}. "
            "Set precision to bfloat16"
        )
