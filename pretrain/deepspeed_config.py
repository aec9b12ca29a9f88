"""The configuration that DeepSpeed gets: made from that of the run, or read from a DeepSpeed JSON and checked."""

from collections.abc import Iterator
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.zero import AUTOCAST, zero_settings
from lrnn.settings import read_json

COPY = "deepspeed.json"  # in a checkpoint: the DeepSpeed JSON as it was when the run started
# Settings that decide how a run is computed, or what is reported of it. Others count as changing the results.
FREE = {
    "zero_optimization", "activation_checkpointing", "aio", "autotuning", "checkpoint", "comms_logger", "csv_monitor",
    "dataloader_drop_last", "dump_state", "elasticity", "flops_profiler", "memory_breakdown", "nebula",
    "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
# Settings that the run's configuration decides, or `precision`, which is compared with it.
DECIDED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "torch_autocast.enabled",
}  # fmt: skip
# Of the ZeRO section: gradients or weights are rounded on their way, or weights are updated late.
NOT_FREE = ("zero_optimization.zero_quantized", "zero_optimization.zenflow")


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: that of `config.zero` or of `config.deepspeed`, with batch sizes and clipping.

    Raises:
        UserError: the JSON is missing or unfit, or contradicts the run's configuration; the batch sizes do not divide.
    """
    if config.deepspeed is None:
        assert config.zero is not None and config.precision is not None
        raw = zero_settings(config.zero, config.precision)
    else:
        raw = _read_deepspeed_json(config.deepspeed, config)
    raw["gradient_clipping"] = config.optim.clip
    raw["train_micro_batch_size_per_gpu"] = config.micro_batch_size
    raw["gradient_accumulation_steps"] = config.batching(0, world_size).accumulation_steps
    raw["train_batch_size"] = config.global_batch_size
    raw.setdefault("steps_per_print", 10**9)
    if config.optim.name == "muon":
        _allow_muon(raw, config)
    return raw


def _allow_muon(raw: dict[str, Any], config: Config) -> None:
    """Make DeepSpeed accept Muon, which is none of the optimizers that it knows.

    Raises:
        UserError: the optimizer's state would be in the host's memory.
    """
    raw["zero_allow_untested_optimizer"] = True
    offload = raw["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        raise UserError(
            f"{config.deepspeed}: zero_optimization.offload_optimizer.device is {offload['device']!r}, but "
            "optim.name = 'muon' keeps its state on the GPU; remove offload_optimizer, or use adamw"
        )


def _read_deepspeed_json(path: str, config: Config) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    The bf16 and fp16 modes are refused: they cast every parameter, and `A_log` and `dt_bias` must stay float32.
    `torch_autocast` computes in bf16 on float32 parameters, gradients and reductions.
    """
    raw = read_json(path, "DeepSpeed configuration")
    for section in ("bf16", "fp16", "torch_autocast", "zero_optimization"):
        if not isinstance(raw.get(section, {}), dict):
            raise UserError(f"{path}: {section} is {raw[section]!r}; it should be a JSON object")
    for mode in ("bf16", "fp16"):
        if raw.get(mode, {}).get("enabled"):
            raise UserError(
                f"{path}: {mode}.enabled casts A_log and dt_bias too; "
                'use "torch_autocast": {"enabled": true, "dtype": "bfloat16", "lower_precision_safe_modules": []}'
            )
    autocast = raw.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("lower_precision_safe_modules") != []:
        raise UserError(f"{path}: torch_autocast.lower_precision_safe_modules must be [], for float32 reduction")
    for key in ("optimizer", "scheduler"):
        if key in raw:
            raise UserError(f"{path}: {key} is set by the run's configuration (optim, schedule), remove it")
    _check_agreement(raw, path, config)
    stage = raw.setdefault("zero_optimization", {}).setdefault("stage", config.zero or 0)
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; 1, 2 and 3 are supported")
    return raw


def _check_agreement(raw: dict[str, Any], path: str, config: Config) -> None:
    """Raise UserError if a DeepSpeed JSON and the run's configuration set the same thing to different values."""
    stage = raw.get("zero_optimization", {}).get("stage")
    if config.zero is not None and stage not in (None, config.zero):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r}, and zero of the run's configuration is {config.zero}; "
            "keep one (the override zero= removes the latter)"
        )
    precision = "bfloat16" if raw.get("torch_autocast", {}).get("enabled") else "float32"
    autocast = "bfloat16" if config.precision == "fp8" else config.precision
    if autocast not in (None, precision):
        raise UserError(
            f"{path}: its torch_autocast means {precision}, and precision of the run's configuration is "
            f"{config.precision}; keep one (the override precision= removes the latter)"
        )
    clip = raw.get("gradient_clipping")
    if clip not in (None, config.optim.clip):
        raise UserError(
            f"{path}: gradient_clipping is {clip!r}, and optim.clip of the run's configuration is {config.optim.clip}; "
            "remove one of them"
        )


def changed_results(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two DeepSpeed JSONs that decide the results and differ, with both values.

    None stands for the settings of a run without such a file.
    """
    then = dict(_settings(_own(now) if before is None else before))
    new = dict(_settings(_own(before) if now is None else now))
    keys = [key for key in {**new, **then} if then.get(key) != new.get(key)]
    return {key: (then.get(key), new.get(key)) for key in keys if _decides_results(key)}


def _own(other: dict[str, Any] | None) -> dict[str, Any]:
    """Return lrnn's own settings, as far as a DeepSpeed JSON has them too: what it leaves out has their values."""
    autocast = (other or {}).get("torch_autocast")
    return {"torch_autocast": {k: v for k, v in AUTOCAST.items() if isinstance(autocast, dict) and k in autocast}}


def _settings(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a JSON object by their dotted names."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _decides_results(key: str) -> bool:
    return key.startswith(NOT_FREE) or (key not in DECIDED and key.partition(".")[0] not in FREE)
