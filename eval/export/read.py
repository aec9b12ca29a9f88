"""Read a trained model: from a checkpoint, or from a model folder of any format that lrnn reads."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.formats.folder import ModelFolder
from lrnn.model_config import every_field
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.init_from.record import NAME as RECORD
from lrnn.pretrain.init_from.record import read_record
from lrnn.tokenizer import Tokenizer, load_copy, load_tokenizer

BEGINNING = {"name", "format", "sha256", "changed", "training"}  # of the record of a beginning; the others are paths


@dataclass
class Trained:
    """A trained model and the facts known about it."""

    model: LrnnForCausalLM  # float32, on the CPU
    tokenizer: Tokenizer
    training: dict[str, Any]  # `lrnn_training` of the exported config.json
    data: dict[str, Any] | None = None  # the checkpoint's description of its data
    run: dict[str, Any] | None = None  # the run's resolved configuration
    results: Path | None = None  # holds the folders of results that the run has for this checkpoint
    origin: str | None = None  # the format of the model folder that it was read from, None for a checkpoint
    dtype: str = "float32"  # of the matrices where it was read from


def read_checkpoint(source: Path) -> Trained:
    """Read the checkpoint `source`, or the newest intact one if `source` is a run folder.

    Raises:
        UserError: `source` is neither, or the checkpoint is incomplete or damaged.
    """
    if (source / "checkpoints").is_dir():
        newest = checkpoint.find_newest(source, warn=partial(print, flush=True))
        if newest is None:
            raise UserError(f"{source} has no complete checkpoint yet")
        source = newest
        print(f"reading {source}", flush=True)
    elif checkpoint.NAME.match(source.name) or any(source.glob("state-*.safetensors")):
        print(f"reading {source}", flush=True)
        checkpoint.verify(source)
    else:
        raise UserError(
            f"{source} is neither a run folder nor a checkpoint (a folder named step-NNNNNNNN) nor a model folder "
            "(with a config.json)"
        )
    config = _config_of(source)
    progress = checkpoint.read_progress(source)
    tokenizer = _tokenizer_of(source)
    _check_vocabulary(tokenizer, config)
    model = empty_model(config)
    SavedState(source).load_into(model)
    files = json.loads((source / "manifest.json").read_text())["files"]
    training = {
        "step": progress["step"],
        "tokens": progress["progress"]["tokens"],
        "seed": progress["data"]["seed"],
        "run_config_sha256": files["run.yaml"]["sha256"],
        "tokenizer_sha256": tokenizer.file_sha256,
    }
    if RECORD in files:
        record = read_record(source) or {}
        training["init_from"] = {name: record[name] for name in record.keys() & BEGINNING}
    try:
        run = yaml.safe_load((source / "run.yaml").read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{source / 'run.yaml'} is not plain YAML: {' '.join(str(error).split())}") from None
    results = source.resolve().parent.parent / "eval" / source.resolve().name  # where slurm/eval.sbatch writes them
    return Trained(model, tokenizer, training, progress["data"], run, results)


def is_model_folder(source: Path) -> bool:
    """Return whether a folder looks like a model folder rather than like a run or a checkpoint."""
    of_run = (source / "checkpoints").is_dir() or any(source.glob("state-*.safetensors"))
    return (source / "config.json").is_file() and not of_run and not checkpoint.NAME.match(source.name)


def read_model_folder(source: Path, tokenizer_path: str | None = None) -> Trained:
    """Read a model folder of any format in `lrnn.formats`.

    Args:
        source: the folder.
        tokenizer_path: SentencePiece .model or tokenizer folder to use instead of the folder's own.

    Raises:
        UserError: the folder or the tokenizer cannot be used; see `ModelFolder` and `load_tokenizer`.
    """
    print(f"reading {source}", flush=True)
    folder = ModelFolder(source)
    tokenizer = load_tokenizer(source if tokenizer_path is None else tokenizer_path)
    _check_vocabulary(tokenizer, folder.config)
    model = empty_model(folder.config)
    folder.load_into(model)
    training = {**(folder.training or {}), "tokenizer_sha256": tokenizer.file_sha256}
    return Trained(model, tokenizer, training, origin=folder.format, dtype=folder.dtype)


def empty_model(config: LrnnConfig) -> LrnnForCausalLM:
    """Return a float32 model on the CPU whose weights are not set yet."""
    with torch.device("meta"):
        model = LrnnForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    return model


def _config_of(source: Path) -> LrnnConfig:
    """Return the model's configuration. Unknown fields are dropped: in an untrusted checkpoint some may name code."""
    known = every_field(LrnnConfig())
    fields = json.loads((source / "config.json").read_text())
    return LrnnConfig(**{name: value for name, value in fields.items() if name in known})


def _tokenizer_of(source: Path) -> Tokenizer:
    folder = source / "tokenizer"
    if not folder.is_dir():  # load_tokenizer would look on the hub
        raise UserError(f"{source} is not a complete checkpoint: it has no folder tokenizer")
    return load_copy(folder)


def _check_vocabulary(tokenizer: Tokenizer, config: LrnnConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer's vocabulary of {tokenizer.vocab_size} exceeds the model's vocab_size {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
