"""How many sequences can be generated at once, from the memory that is free on the GPU."""

from typing import Any

import torch

from lrnn import LrnnConfig
from lrnn.eval.generation.prefill import CHUNK, PIECE_TOKENS
from lrnn.kernels.delta_rule.heads import padded_sizes
from lrnn.model.mixer_deltanet import DeltaNet
from lrnn.model.registry import MIXERS

LARGEST = 1024  # beyond it the state's bytes exceed the weights' many times, and the speed per sequence is constant
COPIES = 3  # of the state: the fixed one, the one after the prompt, and the one that a step writes
KEPT = 0.8  # share of the free memory that is planned for; the rest is for fragments and for libraries


def largest_batch(model: Any, free_bytes: int, tokens: int) -> int:
    """Return how many sequences a model of lrnn can generate at once, between 1 and 1,024.

    Args:
        model: a model of lrnn, on its device.
        free_bytes: memory that is free beside the model, in bytes.
        tokens: tokens of the longest sequence, prompt included, for whose keys and values attention needs memory.
    """
    config = model.config
    itemsize = model.dtype.itemsize
    layers = [config.layer(i) for i in range(config.num_hidden_layers)]
    state = sum(_state(layer) for layer in layers) * torch.float32.itemsize
    state += sum(MIXERS[layer.mixer].cost(layer).cache_per_token for layer in layers) * tokens * itemsize
    # Windows of convolutions, a chunk of activations in the widest layer, and logits, also in float32.
    widest = max(_width(layer) for layer in layers)
    activations = CHUNK * (widest + 3 * config.intermediate_size) * itemsize
    logits = config.vocab_size * (itemsize + torch.float32.itemsize)
    per_sequence = COPIES * state + activations + logits
    piece = PIECE_TOKENS * (widest + 3 * config.intermediate_size) * itemsize
    return int(min(max((KEPT * free_bytes - piece) // per_sequence, 1), LARGEST))


def _state(layer: LrnnConfig) -> int:
    """Return the numbers that a sequence's state of fixed size takes in a layer, with the zeros that pad heads."""
    mixer = MIXERS[layer.mixer]
    if not issubclass(mixer, DeltaNet):
        return mixer.cost(layer).state or 0
    heads = mixer.head_sizes(layer)
    K, V = padded_sizes(heads.K, heads.V)
    return heads.HV * K * V


def _width(layer: LrnnConfig) -> int:
    """Return the numbers per token that a mixer computes: its projections, their convolutions, and its output."""
    cost = MIXERS[layer.mixer].cost(layer)
    return max(8 * layer.hidden_size, cost.weights // layer.hidden_size + cost.channels)


def free_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that PyTorch can still give out: those free, and those it holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
