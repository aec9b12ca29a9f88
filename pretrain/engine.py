"""From configuration to a DeepSpeed engine around the model."""

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.kernels.delta_rule.api import saving_states
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.settings import read_json


def build_model(model_config: LrnnConfig, seed: int, activation_checkpointing: bool) -> LrnnForCausalLM:
    """The model with fresh float32 weights: a pure function of configuration and seed.

    With `activation_checkpointing` a layer of the delta rule that is computed anew saves its states for the backward
    pass, which follows at once.
    """
    torch.manual_seed(seed)
    model = LrnnForCausalLM(model_config)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RuntimeError(f"{name} is not finite after initialisation")
    if activation_checkpointing:
        with warnings.catch_warnings():  # the new name of this method is not in every version we admit
            warnings.simplefilter("ignore", FutureWarning)
            # The check would compare the sizes of what is saved with those of the first time.
            options = {"context_fn": lambda: (nullcontext(), saving_states()), "determinism_check": "none"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})
    return model.train()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on norms, A_log, dt_bias, other vectors and the taps of the convolutions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "conv1d" not in name and not name.endswith("A_log")  # Mamba's has two
        (decayed if is_matrix else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON with its batch sizes filled in.

    Raises UserError for bf16 and fp16 modes: they cast every parameter, and `A_log` and `dt_bias` must stay float32.
    `torch_autocast` computes in bf16 on float32 parameters, gradients and reductions.
    """
    raw = read_json(config.deepspeed, "DeepSpeed configuration")
    for section in ("bf16", "fp16", "torch_autocast", "zero_optimization"):
        if not isinstance(raw.get(section, {}), dict):
            raise UserError(f"{config.deepspeed}: {section} is {raw[section]!r}; it should be a JSON object")
    for mode in ("bf16", "fp16"):
        if raw.get(mode, {}).get("enabled"):
            raise UserError(
                f"{config.deepspeed}: {mode}.enabled casts A_log and dt_bias too; "
                'use "torch_autocast": {"enabled": true, "dtype": "bfloat16", "lower_precision_safe_modules": []}'
            )
    autocast = raw.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("lower_precision_safe_modules") != []:
        raise UserError(
            f"{config.deepspeed}: torch_autocast.lower_precision_safe_modules must be [], for float32 reduction"
        )
    for key in ("optimizer", "scheduler"):
        if key in raw:
            raise UserError(f"{config.deepspeed}: {key} is set by the run's configuration (optim, schedule), remove it")
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"{config.deepspeed}: zero_optimization.stage is {stage!r}; 1, 2 and 3 are supported")
    raw["train_micro_batch_size_per_gpu"] = config.micro_batch_size
    raw["gradient_accumulation_steps"] = config.batching(0, world_size).accumulation_steps
    raw["train_batch_size"] = config.global_batch_size
    raw.setdefault("steps_per_print", 10**9)
    return raw


def build_engine(model: LrnnForCausalLM, config: Config, ranks: Ranks) -> Any:
    """Wrap the model: ZeRO as the JSON says, AdamW with float32 state."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay),
        lr=config.optim.lr,
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
        fused=ranks.device.type == "cuda",
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config, ranks.world_size), dist_init_required=False
    )
    return engine
