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


def make_room(engine: Engine, device: torch.device) -> None:
    """Allocate what `fill` takes to gather the largest weight under ZeRO-3, and free it: torch keeps it for `fill`.

    A rank without that memory raises its error here, where no other rank waits for it in a collective yet.
    """
    weights: list[Any] = [weight for weight in engine.module.parameters() if _is_partitioned(weight)]
    if weights:
        largest = max(weights, key=lambda weight: weight.ds_numel)
        padding = largest.ds_tensor.ds_numel  # all ranks have parts of this size
        torch.empty(largest.ds_numel + padding, dtype=largest.ds_tensor.dtype, device=device)


@torch.no_grad()
def fill(model: LrnnForCausalLM, engine: Engine) -> None:
    """Copy the weights of a run into a model, rounded to its dtypes. All ranks call this together."""
    weights = dict(engine.module.named_parameters())
    for name, parameter in model.named_parameters():
        with _whole(weights[name]):
            parameter.copy_(weights[name])


def _whole(weight: nn.Parameter) -> AbstractContextManager[Any]:
    """Return a context in which a weight is whole on every rank, although ZeRO-3 may have partitioned it."""
    if not _is_partitioned(weight):
        return nullcontext()
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters([weight])


def _is_partitioned(weight: nn.Parameter) -> bool:
    """Return whether a rank has only a part of a weight. ZeRO-3 keeps small ones whole on every rank."""
    if not hasattr(weight, "ds_status"):
        return False
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return weight.ds_status != ZeroParamStatus.AVAILABLE
