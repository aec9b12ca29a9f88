"""Compare the configuration of a run that resumes with the one that its checkpoint was trained with.

Every changed key is shown. Those that change what the run computes are refused unless `--allow-change` is given: a
learning rate, a batch size, or the number of steps, which moves the schedule. `progress.py` compares model and data.
"""

from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.parsing import parse_yaml
from lrnn.pretrain import old_config
from lrnn.pretrain.config import Config
from lrnn.pretrain.deepspeed_config import COPY, changed_results
from lrnn.pretrain.stage_changes import refused_with_stages
from lrnn.settings import read_json

Changes = dict[str, tuple[Any, Any]]  # of each changed key, the values before and now

# Keys, or sections of keys, that may differ between two starts of a run. They decide how it is computed, not what.
FREE = {
    "run_dir", "zero", "deepspeed", "micro_batch_size", "activation_checkpointing", "fused_layers", "checkpoint", "log",
    "profile", "watchdog", "eval", "samples", "max_skipped_steps", "spikes.max_rollbacks",
}  # fmt: skip
# See lrnn.pretrain.progress, lrnn.pretrain.init_from and lrnn.pretrain.stage_changes.
COMPARED_BY_CONTENT = {"model", "data", "seed", "init_from", "stages"}


def check_changes(saved: Path, config: Config, allow_change: bool) -> Changes:
    """Return the keys that differ from the configuration in a checkpoint.

    Args:
        saved: folder of the checkpoint.
        config: the configuration of the run that resumes.
        allow_change: accept changes of the results.

    Raises:
        UserError: a key that changes the results is not what it was, and `allow_change` is false; or the optimizer is
            another one, whose state the checkpoint lacks.
    """
    file = saved / "run.yaml"
    before = parse_yaml(file.read_text(encoding="utf-8"), str(file)).value
    if not isinstance(before, dict):
        raise UserError(f"{file} is not a mapping of keys to values")
    copy = saved / COPY  # older checkpoints have none
    engine = read_json(copy, "DeepSpeed configuration") if copy.exists() else None
    before = old_config.convert(before, str(file))
    changes = find_changes(before, config, engine)
    if "optim.name" in changes:
        old, new = changes["optim.name"]
        raise UserError(
            f"{saved} holds the state of optim.name = {old!r}, and {new!r} cannot continue from it; restore "
            f"{old!r}, or choose another run_dir and start from these weights with init_from"
        )
    refused = {key: values for key, values in changes.items() if changes_results(key)}
    if config.stages or before.get("stages"):
        refused = refused_with_stages(changes, refused, saved, before, config)
    if refused and not allow_change:
        listing = ", ".join(f"{key} = {old!r} (now {new!r})" for key, (old, new) in refused.items())
        raise UserError(
            f"{saved} was trained with {listing}, which changes the results; add --allow-change to continue with the "
            "new values, restore the old ones, or choose another run_dir"
        )
    return changes


def find_changes(before: dict[str, Any], config: Config, engine: dict[str, Any] | None = None) -> Changes:
    """Return the keys whose values differ.

    Args:
        before: the earlier configuration. Keys that it is older than had their present defaults.
        config: the configuration now.
        engine: content of the DeepSpeed JSON that `before` names, None if it is not known. Its settings that differ now
            and decide results are among the keys: `deepspeed.communication_data_type`.
    """
    then, now = flatten(before), flatten(config.model_dump())
    defaults = flatten(run_defaults())
    if then.get("deepspeed") is not None:  # which decides them, unless they are given too
        defaults |= {"zero": None, "precision": None}
    then = defaults | then
    engine_now = _engine(now)
    now["precision"] = _precision(now, engine_now)
    # Of a file that is gone, no change is known.
    then["precision"] = _precision(then, engine or _engine(then)) or now["precision"]
    changes = {key: (then.get(key), now.get(key)) for key in {**now, **then} if then.get(key) != now.get(key)}
    if engine is not None or then["deepspeed"] is None:
        changes |= {f"deepspeed.{key}": values for key, values in changed_results(engine, engine_now).items()}
    return changes


def changes_results(key: str) -> bool:
    """Return whether a changed key is refused unless changes are allowed."""
    words = key.split(".")
    if words[0] == "deepspeed":
        return len(words) > 1  # The path may change, and a setting that is among the changes may not.
    return not (FREE | COMPARED_BY_CONTENT) & {".".join(words[:n]) for n in range(1, len(words) + 1)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by their dotted keys. A list is one value; so is the model, whatever form it is given in."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key != "model":
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def run_defaults() -> dict[str, Any]:
    """Return a configuration in which every key that has a default has it."""
    data = {"seq_len": 1, "corpora": [{"path": "x"}]}
    required = {"run_dir": "x", "model": "x", "data": data, "optim": {"lr": 1.0}, "steps": 1}
    sizes = {"global_batch_size": 1, "micro_batch_size": 1}
    return Config.model_validate(required | sizes).model_dump()


def _engine(flat: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a run's DeepSpeed JSON; None if it has none, or it cannot be read any more."""
    try:
        return None if flat["deepspeed"] is None else read_json(flat["deepspeed"], "DeepSpeed configuration")
    except UserError:
        return None


def _precision(flat: dict[str, Any], engine: dict[str, Any] | None) -> str | None:
    """Return the precision of a run; None if its DeepSpeed JSON, which decides it, is not known."""
    if flat["deepspeed"] is None or flat["precision"] is not None or engine is None:
        return flat["precision"]
    autocast = engine.get("torch_autocast")
    return "bfloat16" if isinstance(autocast, dict) and autocast.get("enabled") else "float32"
