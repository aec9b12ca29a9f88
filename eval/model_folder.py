"""Check and describe an exported model folder, which may come from anywhere: no code in it is run."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import sha256

TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # the first of a folder has its ids


def check_export(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder: an export, or a causal language model of transformers or fla.

    Raises:
        UserError: the folder is not a complete model, its weights are not safetensors (other formats are pickles), it
            is not a causal language model, needs code of its own, or has a configuration that its type refuses.
    """
    if not folder.is_dir():
        raise UserError(f"model folder not found: {folder}")
    wanted = {"config.json": "config.json", "tokenizer_config.json": "tokenizer", "model.safetensors*": "weights"}
    for pattern, what in wanted.items():
        if not any(folder.glob(pattern)):
            raise UserError(
                f"{folder} is not an exported model: it holds no {what} ({pattern}); "
                "`lrnn export` makes one from a checkpoint"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type: not an exported model")
    if not isinstance(config["model_type"], str) or not _is_known(config["model_type"]):
        raise UserError(
            f"{folder / 'config.json'}: neither lrnn nor transformers has the model_type {config['model_type']!r}, and "
            "code that comes with a model is not run; export the checkpoint with --format hf"
        )
    if not _is_causal(config["model_type"]):
        raise UserError(f"{folder / 'config.json'}: a {config['model_type']!r} is not a causal language model")
    _check_config(folder / "config.json", config)
    _check_shards(folder / "model.safetensors.index.json")
    return config


def _is_known(model_type: str) -> bool:
    """Return whether lrnn or transformers has a type of model, or fla, which registers its own when it is imported."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING and find_spec("fla") is not None:
        importlib.import_module("fla")
    return model_type in CONFIG_MAPPING


def _is_causal(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise UserError if the type of model does not take the values of its configuration."""
    from transformers import CONFIG_MAPPING

    try:
        CONFIG_MAPPING[config["model_type"]].from_dict(config)
    except Exception as error:  # of the type's own code, of any type
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read as a configuration of {config['model_type']!r}: {said}") from error


def _check_shards(index: Path) -> None:
    """Raise UserError if the index of sharded weights is damaged or names a file that transformers would unpickle."""
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of weights: {error!r}") from None
        for name in names:
            if not str(name).endswith(".safetensors"):
                raise UserError(f"{index} names {name!r}; only weights in safetensors are read")


def describe_model(folder: Path) -> dict[str, Any]:
    """Return fingerprints of a model folder: the SHA-256 of its configuration, tokenizer and every weights file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "path": str(folder.resolve()),
        "model_type": config.get("model_type"),
        "config_sha256": sha256(folder / "config.json"),
        "tokenizer_sha256": next((sha256(folder / name) for name in TOKENIZERS if (folder / name).is_file()), None),
        "weights_sha256": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "training": config.get("lrnn_training"),
    }


def says_add_bos(folder: Path) -> bool | None:
    """Return `add_bos_token` of the folder's tokenizer_config.json, None if it does not say."""
    file = folder / "tokenizer_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("add_bos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a JSON object: {error}") from error
    if said is not None and not isinstance(said, bool):
        raise UserError(f"{file}: add_bos_token should be true or false, it is {said!r}")
    return said


def default_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Return the names of a device and a dtype: a GPU and bfloat16 if there is one, otherwise the CPU and float32."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, dtype or ("bfloat16" if device.startswith("cuda") else "float32")
