"""Where the weights are that a run begins with: a model folder, a run, or one of its checkpoints."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.files import sha256
from lrnn.formats.config import own_fields, read_config
from lrnn.formats.folder import EMBEDDING, HEAD, ModelFolder, grown
from lrnn.model_config import model_config_from
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.settings import read_json
from lrnn.tokenizer import Tokenizer, load_copy, load_tokenizer

READERS = 4  # files whose checksums are computed at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")


class Source(Protocol):
    """Weights that were trained before.

    Attributes:
        path: the folder that holds them.
        format: what kind of folder that is.
        config: their model.
        training: what is known about how they were trained, or None.
    """

    path: Path
    format: str
    config: LrnnConfig
    training: dict[str, Any] | None

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of the files that decide the model, by name: its configuration and its weights.

        All of these files are read.
        """

    def load_into(self, model: nn.Module) -> None:
        """Fill a model of the configuration, or one with a larger vocabulary. Raise UserError if that fails."""


class ExportedWeights(ModelFolder):
    """The weights of a model folder."""

    def checksums(self) -> dict[str, str]:
        files = [self.path / "config.json", *self.tensors.files]
        with ThreadPoolExecutor(READERS) as pool:  # hashes leave Python's lock to other threads
            return dict(zip([file.name for file in files], pool.map(sha256, files), strict=True))


class SavedWeights:
    """The weights of a checkpoint of lrnn, without the moments of its optimizer. `checksums` verifies it.

    Raises:
        UserError: the checkpoint is incomplete.
    """

    format = "checkpoint"

    def __init__(self, path: Path):
        self.path = path
        fields = own_fields(read_json(path / "config.json", "model configuration"))
        self.config = model_config_from(fields, str(path / "config.json"))
        progress = checkpoint.read_progress(path)
        self.training: dict[str, Any] | None = {"step": progress["step"], "tokens": progress["progress"]["tokens"]}

    def checksums(self) -> dict[str, str]:
        """Return them as `Source` does. Raise UserError if a file is damaged."""
        files = checkpoint.verify(self.path)["files"]
        wanted = [name for name in files if name == "config.json" or name.startswith("state-")]
        return {name: files[name]["sha256"] for name in wanted}

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        state = SavedState(self.path)
        for name, parameter in model.named_parameters():
            rows = self.config.vocab_size if name in (EMBEDDING, HEAD) else parameter.shape[0]
            shape = (rows, *parameter.shape[1:])
            value = state.read("param", name, 0, math.prod(shape)).view(shape)
            parameter.copy_(grown(value, parameter.shape[0]))


def open_source(path: Path) -> Source:
    """Open the weights at a path. Raises UserError if they cannot be used."""
    saved = _checkpoint_at(path)
    return ExportedWeights(path) if saved is None else SavedWeights(saved)


def fields_of_source(path: Path) -> dict[str, Any]:
    """Return the fields of the model of a path, without looking at weights. Raises UserError if it has none."""
    saved = _checkpoint_at(path)
    if saved is None:
        return read_config(path)[1]
    return own_fields(read_json(saved / "config.json", "model configuration"))


def tokenizer_of(source: Source) -> Tokenizer | None:
    """Return the tokenizer of the weights, or None if their folder has none."""
    if isinstance(source, SavedWeights):
        return load_copy(source.path / "tokenizer")
    has_one = any((source.path / name).is_file() for name in TOKENIZER_FILES)
    return load_tokenizer(source.path) if has_one else None


def _checkpoint_at(path: Path) -> Path | None:
    """Return the checkpoint that a path names: the newest of a run, or itself. None if it is of another kind."""
    if (path / "checkpoints").is_dir():
        saved = checkpoint.list_checkpoints(path)
        if not saved:
            raise UserError(f"init_from {path} is a run without a checkpoint yet")
        return next((folder for folder in reversed(saved) if checkpoint.looks_whole(folder)), saved[-1])
    return path if checkpoint.NAME.match(path.name) and (path / "manifest.json").is_file() else None
