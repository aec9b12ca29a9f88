"""A model folder of any format that lrnn reads, with its weights under lrnn's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrnn import LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.formats.config import OLMO, read_config
from lrnn.formats.olmo_hybrid import olmo_sources
from lrnn.formats.tensors import DTYPES, TensorFiles
from lrnn.model_config import model_config_from

EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"


class ModelFolder:
    """A model folder, whose weights have been compared with its configuration by name, shape and dtype.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        format: one of `lrnn.formats.config.FORMATS`.
        config: the configuration of lrnn's model that computes the same.
        training: what lrnn recorded of the training when it exported the model, or None.
        tensors: the weights' files.

    Raises:
        UserError: the folder cannot be read, or a tensor is missing, left over, or of another shape than the
            configuration asks for. The message names the tensor as the folder does.
    """

    def __init__(self, path: Path):
        self.path = path
        self.format, fields, raw = read_config(path)
        self.config = model_config_from(fields, str(path / "config.json"))
        kept = raw.get("lrnn_training")
        self.training: dict[str, Any] | None = kept if isinstance(kept, dict) else None
        self.tensors = TensorFiles(path)
        with torch.device("meta"):
            model = LrnnForCausalLM(self.config)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._sources = self._find_sources(raw)
        self._check()

    @property
    def dtype(self) -> str:
        """Return the dtype of an export that keeps every value: "bfloat16" if the matrices are, else "float32"."""
        dtypes = {entry.dtype for entry in self.tensors.entries.values() if len(entry.shape) == 2}
        return "bfloat16" if dtypes == {"BF16"} else "float32"

    def read(self, name: str) -> Tensor:
        """Return a parameter of lrnn's model, in the dtype of the file.

        Raises:
            UserError: a value is infinite or NaN.
        """
        names, first = self._sources[name]
        parts = [self.tensors.read(source) for source in names]
        value = (parts[0] if len(parts) == 1 else torch.cat(parts))[first : first + self._shapes[name][0]]
        if not torch.stack(torch.aminmax(value.float())).isfinite().all():
            raise UserError(f"{self.path}: the tensor {names[0]} has values that are infinite or NaN")
        return value

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model of this configuration. Its vocabulary may be larger, see `grown`.

        Raises:
            UserError: a value is infinite or NaN.
        """
        for name, parameter in model.named_parameters():
            value = self.read(name).to(parameter.dtype)
            parameter.copy_(grown(value, parameter.shape[0]) if name in (EMBEDDING, HEAD) else value)

    def _find_sources(self, raw: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], int]]:
        """Return where each parameter is: the names of the tensors that hold it, and its first row in them."""
        if self.format != OLMO:
            return {name: ((name,), 0) for name in self._shapes}
        kinds = ["full_attention" if mixer == "attention" else "linear_attention" for mixer in self.config.mixers]
        present = {name: entry.shape for name, entry in self.tensors.entries.items()}
        return olmo_sources(self._shapes, kinds, present)

    def _check(self) -> None:
        """Raise UserError unless the tensors are those of the configuration."""
        rows: dict[tuple[str, ...], int] = {}
        for name, (names, _) in self._sources.items():
            rows[names] = rows.get(names, 0) + self._shapes[name][0]
        for name, (names, _) in self._sources.items():
            self._check_tensors(names, (rows[names], *self._shapes[name][1:]))
        used = {name for names in rows for name in names}
        for name in sorted(self.tensors.entries.keys() - used):
            if name == HEAD and self.config.tie_word_embeddings:
                self._check_tied_head()
            else:
                file = self.tensors.entries[name].file.name
                raise UserError(f"{self.path}: {file} holds the tensor {name}, which the model of config.json lacks")

    def _check_tensors(self, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Raise UserError unless tensors are there and, one after the other, have a shape."""
        entries = self.tensors.entries
        for name in names:
            if name not in entries:
                raise UserError(f"{self.path}: the tensor {name} is missing, of shape {list(shape)}")
            if entries[name].dtype not in DTYPES:
                self.tensors.read(name)  # which says why it is not read
        shapes = [entries[name].shape for name in names]
        found = (sum(s[0] for s in shapes if s), *shapes[0][1:])
        if found != shape or any(s[1:] != shape[1:] for s in shapes):
            several = f", with {', '.join(names[1:])}," if len(names) > 1 else ""
            raise UserError(
                f"{self.path}: the tensor {names[0]}{several} has shape {list(found)}; config.json asks for "
                f"{list(shape)}"
            )

    def _check_tied_head(self) -> None:
        (embedding,), _ = self._sources[EMBEDDING]
        if not torch.equal(self.tensors.read(HEAD), self.tensors.read(embedding)):
            raise UserError(
                f"{self.path}: config.json has tie_word_embeddings, but the tensor {HEAD} is not {embedding}; set it "
                "to false there, or remove the tensor"
            )


def grown(rows: Tensor, count: int) -> Tensor:
    """Return an embedding or an output layer with `count` rows. The new ones are the mean of those that it has.

    So a new token begins as an average one, as with `resize_token_embeddings` of transformers, but without noise.
    """
    missing = count - rows.shape[0]
    if missing == 0:
        return rows
    mean = rows.double().mean(0, keepdim=True).to(rows.dtype)
    return torch.cat([rows, mean.expand(missing, -1)])
