"""A training step of flash-linear-attention's model of the same shape, for comparison."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrnn import LrnnConfig
from lrnn.bench.peers import fla_guard, fla_guard_lifted
from lrnn.formats.fla import TYPE_OF, not_in_fla, to_fla_config
from lrnn.pretrain.config import Config
from lrnn.pretrain.data.micro_batch import MicroBatch, model_inputs
from lrnn.pretrain.optim import build_optimizer

DTYPES = (torch.float32, torch.bfloat16)  # of the parameters; both run under autocast to bf16


def reason_without(config: LrnnConfig, world_size: int) -> str | None:
    """Import fla, and return why its model cannot be measured beside ours, or None if it can."""
    if world_size > 1:
        return "it is measured on one GPU only"
    if importlib.util.find_spec("fla") is None:
        return "it is not installed"
    if not set(config.mixers) <= TYPE_OF.keys():
        return f"it has no model with the parameters of mixer {', '.join(dict.fromkeys(config.mixers))}"
    if (form := not_in_fla(config)) is not None:
        return f"it cannot express {form}"
    try:
        importlib.import_module("fla.models")  # which registers the models
    except Exception as error:  # a peer that does not import here must not keep lrnn from being measured
        return f"importing it failed: {error!r}"
    return None


def notes(config: Config) -> list[str]:
    """Return what to know about the figures of fla's model."""
    lines = ["its parameters are in float32 or bfloat16, and it computes under autocast to bf16"]
    if config.activation_checkpointing == "mlp":
        lines.append("it keeps all activations, because it has no activation_checkpointing: mlp")
    guard = fla_guard()
    return lines if guard is None else [*lines, guard]


def build(config: LrnnConfig, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Return fla's model with fresh weights and its fused linear cross-entropy, which never holds all logits.

    `reason_without` must have imported fla before.

    Args:
        config: of our model; fla's has the same parameters.
        dtype: of the parameters, but for `A_log` and `dt_bias`, which are float32, as when either model is loaded.
        device: the device of the parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    losses = {"fuse_cross_entropy": False, "fuse_linear_cross_entropy": True}
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**to_fla_config(config) | losses | {"use_cache": False}), dtype=torch.float32
        )
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    return model.train()


def training_step(model: nn.Module, config: Config, batches: list[MicroBatch], device: torch.device) -> Callable:
    """Return a function that computes a step of `batches` with learning rate 0: the same work as a step of ours.

    fla takes documents as one row.
    """
    if config.activation_checkpointing == "full":
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    optimizer = build_optimizer(model, config.optim.model_copy(update={"name": "adamw", "lr": 0.0}), device)

    def step() -> None:
        with fla_guard_lifted():
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(**_arguments(batch, device), use_cache=False).loss / len(batches)
                loss.backward()
            if config.optim.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _arguments(batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """Return a micro-batch as fla's model takes it, which moves the labels by one position itself."""
    inputs = model_inputs(batch, device)
    if "cu_seqlens" not in inputs:
        return {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}
    row = inputs["input_ids"].reshape(1, -1)
    return {"input_ids": row, "labels": row, "cu_seqlens": inputs["cu_seqlens"]}
