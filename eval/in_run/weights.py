"""A plain model with the weights that a run has at the moment."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.eval.export.write import round_weights
from lrnn.pretrain.engine import Engine


def empty_copy(config: LrnnConfig, device: torch.device, dtype: torch.dtype) -> LrnnForCausalLM:
    """Return a model on a device whose weights are not set yet. The gates are float32, others as `dtype` says.

    Args:
        config: names the tokens of its generation too.
    """
    with torch.device("meta"):
        model = LrnnForCausalLM(copy.deepcopy(config))
    round_weights(model, dtype)
    model.to_empty(device=device).tie_weights()
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(model: LrnnForCausalLM, engine: Engine) -> None:
    """Copy the weights of a run into a model, rounded to its dtypes. All ranks call this together."""
    weights = dict(engine.module.named_parameters())
    for name, parameter in model.named_parameters():
        with _whole(weights[name]):
            parameter.copy_(weights[name])


def _whole(weight: nn.Parameter) -> AbstractContextManager[Any]:
    """Return a context in which a weight is whole on every rank, although ZeRO-3 may have partitioned it."""
    if not hasattr(weight, "ds_status"):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # Small ones are always whole, and would be partitioned at the end of the context.
    return nullcontext() if weight.ds_status == ZeroParamStatus.AVAILABLE else GatheredParameters([weight])
