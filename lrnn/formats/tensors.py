"""Read the safetensors files of a model folder: names, shapes and dtypes first, values when they are asked for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import safetensors
import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.files import LFS_POINTER, NOT_FETCHED

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # float32 holds all of their values
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, as the file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in the words of safetensors, such as "BF16"


class TensorFiles:
    """The tensors of a model folder.

    Args:
        folder: holds `model.safetensors`, or shards with or without an index.

    Attributes:
        files: the files, in the order of their names.
        entries: every tensor by its name.

    Raises:
        UserError: the folder has no such files, one is missing or damaged, or two hold a tensor of the same name.
    """

    def __init__(self, folder: Path):
        self.files = _files_of(folder)
        entries: dict[str, TensorEntry] = {}
        self._open = {file: _opened(file) for file in self.files}
        for file, content in self._open.items():
            for name in content.keys():  # noqa: SIM118 (not a mapping)
                part = content.get_slice(name)
                if name in entries:
                    raise UserError(f"{folder}: {entries[name].file.name} and {file.name} both hold the tensor {name}")
                entries[name] = TensorEntry(file, tuple(part.get_shape()), part.get_dtype())
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(entries)

    def read(self, name: str) -> Tensor:
        """Return a tensor in the dtype of the file.

        Raises:
            UserError: its dtype is not one of `DTYPES`.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise UserError(f"{entry.file}: the tensor {name} is {entry.dtype}; weights are read in {known}")
        return self._open[entry.file].get_tensor(name)


def _files_of(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        return _indexed_files(index)
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has no {SINGLE}, and {pickles[0]} is a pickle, which can run code when it is read; write the "
            "weights as safetensors, such as with save_pretrained of a recent transformers"
        )
    raise UserError(f"{folder} has no {SINGLE}; weights in other formats are not read")


def _indexed_files(index: Path) -> list[Path]:
    """Return the files that an index of sharded weights names. Raise UserError if one is missing or may not be read."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weights: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}; only safetensors files of the folder itself are read")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name} is missing; {index.name} names it")
    if SINGLE not in names and (index.parent / SINGLE).is_file():
        raise UserError(f"{index.parent} has both {SINGLE} and {INDEX}, which does not name it; remove one of them")
    return [index.parent / name for name in names]


def _opened(file: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        pointer = False
        if file.is_file():  # not a folder, or a link to what is gone
            with file.open("rb") as content:
                pointer = content.read(len(LFS_POINTER)) == LFS_POINTER
        reason = NOT_FETCHED if pointer else f"cannot be read as safetensors ({error}); it may be cut short"
        raise UserError(f"{file} {f'is {reason}' if pointer else reason}") from None
