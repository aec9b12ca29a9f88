"""Floating-point operations of the model, for MFU."""

from lrnn.model.configuration_lrnn import LrnnConfig
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.gpus import find_device


def train_flops_per_token(config: LrnnConfig) -> float:
    """Return the FLOPs of forward and backward for one token: three times the forward pass.

    Forward, where a multiply-add counts as two:
        2 x every weight of a linear map (projections, MLP, head; the embedding is a look-up),
        2 x taps for each channel of the short convolutions,
        the products of the recurrence with the state or with the other tokens, see `Cost`. This is what the recurrence
        needs for any chunk size; the chunkwise form and recomputation do more, which does not count.
    """
    layers = sum(_products_of(config.layer(i)) for i in range(config.num_hidden_layers))
    return 3 * 2 * float(layers + config.vocab_size * config.hidden_size)


def _products_of(layer: LrnnConfig) -> int:
    """Return the multiply-adds of a layer for one token, forward."""
    cost = MIXERS[layer.mixer].cost(layer)
    mlp = 3 * layer.hidden_size * layer.intermediate_size
    return cost.weights + mlp + cost.channels * layer.conv_size + cost.recurrence


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device, or None if it is not in the table of GPUs."""
    gpu = find_device(device_name)
    return None if gpu is None else 1e12 * gpu.bfloat16
