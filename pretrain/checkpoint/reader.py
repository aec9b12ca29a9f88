"""Read the training state of a checkpoint, written by any number of processes under any ZeRO stage."""

from pathlib import Path

import safetensors
import torch
from torch import Tensor

from lrnn.pretrain.checkpoint.format import BrokenCheckpoint, read_manifest


class SavedState:
    """The float32 parameters and the optimizer's state of a checkpoint; any slice of any of them can be read.

    Raises:
        BrokenCheckpoint: a file of the state is not a safetensors file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = {}
        self._index: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for name in read_manifest(folder)["files"]:
            if not name.startswith("state-"):
                continue
            try:
                self._files[name] = safetensors.safe_open(folder / name, framework="pt")
            except safetensors.SafetensorError as error:
                raise BrokenCheckpoint(f"{folder / name} is not a safetensors file ({error})") from None
            for key in self._files[name].keys():  # noqa: SIM118 (not a mapping)
                kind, parameter, start = key.split(":")
                end = int(start) + self._files[name].get_slice(key).get_shape()[0]
                self._index.setdefault((kind, parameter), []).append((int(start), end, name, key))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor, float32 on the CPU.

        Args:
            kind: "param", or a kind of the optimizer's state; see `zero_state.Fragment`.
            name: name of the parameter.

        Raises:
            BrokenCheckpoint: the checkpoint does not hold all of them.
        """
        out = torch.empty(numel)
        missing = numel
        for low, high, file, key in self._index.get((kind, name), []):
            a, b = max(low, start), min(high, start + numel)
            if a < b:
                out[a - start : b - start] = self._files[file].get_slice(key)[a - low : b - low]
                missing -= b - a
        if missing:
            raise BrokenCheckpoint(
                f"{self.folder} lacks {missing} of {numel} elements of {kind} {name} from element {start} on"
            )
        return out

    def names(self, kind: str) -> list[str]:
        """Return the names of what the checkpoint holds of a kind, sorted."""
        return sorted(name for of, name in self._index if of == kind)

    def read_rows(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Return rows [start, start + count) of a tensor that was saved by rows, [count, ...] in its dtype on the CPU.

        Raises:
            BrokenCheckpoint: the checkpoint does not hold all of them.
        """
        pieces = []
        for low, high, file, key in sorted(self._index.get((kind, name), [])):
            a, b = max(low, start), min(high, start + count)
            if a < b:
                pieces.append(self._files[file].get_slice(key)[a - low : b - low])
        found = sum(len(piece) for piece in pieces)
        if found != count:
            raise BrokenCheckpoint(f"{self.folder} has {found} of {count} rows of {kind} {name} from row {start} on")
        return torch.cat(pieces)

    def parameters(self) -> set[str]:
        """Return the names of the parameters that the checkpoint holds any element of."""
        return {name for kind, name in self._index if kind == "param"}

    def load_into(self, model: torch.nn.Module) -> None:
        """Copy the float32 parameters into a model of the same architecture, not yet partitioned.

        Raises:
            BrokenCheckpoint: a parameter of either is unknown to the other, or incomplete.
        """
        parameters = dict(model.named_parameters())
        unknown = sorted(self.parameters() ^ set(parameters))
        if unknown:
            raise BrokenCheckpoint(f"{self.folder} and the model do not share the parameter {unknown[0]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.read("param", name, 0, parameter.numel()).view_as(parameter))
