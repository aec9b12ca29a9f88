"""The parameters of a model, counted without its weights."""

import torch

from lrnn import LrnnConfig, LrnnForCausalLM


def count_parameters(config: LrnnConfig) -> tuple[int, int]:
    """Return the number of a model's parameters, and of those that are neither in the embedding nor in the head."""
    with torch.device("meta"):
        model = LrnnForCausalLM(config)
    ends = {id(layer.weight): layer.weight.numel() for layer in (model.get_input_embeddings(), model.lm_head)}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(ends.values())
