"""States that the rows of the batch carry from one step to the next: truncated backpropagation through time.

The next sample of a row begins with the state that the one before left: of each layer the recurrent state, the last
inputs of its short convolutions and, in attention, the keys and values of the window. No gradient flows through it. A
row begins with a fresh state where its chain of samples does, and where a document does if documents reset the state.

The states belong to rows of the global batch, so that a checkpoint continues on any number of processes. Those that are
not finite are dropped after a step that was not applied. All are dropped after a rollback, since the data in between
are left out.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.model.cache import LrnnCache, LrnnCacheLayer
from lrnn.model.layers import Mixer, zero_rows
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.data.chains import Chains
from lrnn.pretrain.data.micro_batch import MicroBatch

KIND = "carried"  # of the tensors in a checkpoint


class CarriedLayer(LrnnCacheLayer):
    """The state of a layer ahead of a sample and, apart from it, the state behind it.

    What is read is the state ahead, however often the layer is computed. What is written is kept in `behind`, without
    gradients.
    """

    keeps_both_states = True

    def __init__(self, conv: Tensor | None = None, state: Any = None, seen_tokens: int = 0):
        self._ahead = conv, state
        self._seen_tokens = seen_tokens
        self.behind: dict[str, Any] = {}
        super().__init__()

    def reset(self) -> None:
        self.behind = {"conv": None, "state": None}

    @property
    def conv(self) -> Tensor | None:
        return self._ahead[0]

    @conv.setter
    def conv(self, x: Tensor | None) -> None:
        self.behind["conv"] = _detached(x)

    @property
    def state(self) -> Any:
        return self._ahead[1]

    @state.setter
    def state(self, x: Any) -> None:
        self.behind["state"] = _detached(x)

    @property
    def seen_tokens(self) -> int:
        return self._seen_tokens

    @seen_tokens.setter
    def seen_tokens(self, count: int) -> None:
        """Keep the number ahead, which a layer that is computed again reads again."""


class CarriedStates:
    """The states of this rank's rows.

    Args:
        mixers: the mixers of the model's layers.
        chains: the chains of samples that rows read.
        batching: batch sizes, and the place of this process among all.
        seq_len: tokens per sample.
    """

    def __init__(self, mixers: list[Mixer], chains: Chains, batching: Batching, seq_len: int):
        self._mixers, self._chains, self._batching, self._seq_len = mixers, chains, batching, seq_len
        self._rows = batching.own_samples(0)[0]  # [micro-batches, rows of each]
        # Of each micro-batch the state of each layer, (conv, state); None ahead of the first sample.
        self._kept: list[list[tuple[Tensor | None, Any]] | None]
        self.reset()

    def reset(self) -> None:
        """Drop all states: every row begins with a fresh state at its next sample."""
        self._kept = [None] * len(self._rows)

    def fresh(self) -> "CarriedStates":
        """Return other states of the same rows, all fresh."""
        return CarriedStates(self._mixers, self._chains, self._batching, self._seq_len)

    def ahead(self, number: int, batch: MicroBatch) -> LrnnCache:
        """Return the states ahead of this rank's micro-batch of that number in the step."""
        assert batch.continues is not None
        kept, begins = self._kept[number], ~batch.continues
        cache = LrnnCache(len(self._mixers))
        _, place = self._chains.locate(batch.sample_indices.numpy())
        seen = int(place.max()) * self._seq_len
        if kept is None or bool(begins.all()):
            cache.layers = [CarriedLayer() for _ in self._mixers]
            return cache
        if bool(begins.any()):
            kept = [_begin_rows(mixer, *layer, begins) for mixer, layer in zip(self._mixers, kept, strict=True)]
        cache.layers = [CarriedLayer(conv, state, seen) for conv, state in kept]
        return cache

    def keep(self, number: int, cache: LrnnCache) -> None:
        """Keep the states behind that micro-batch. Its backward pass may compute the layers again."""
        self._kept[number] = [(layer.behind["conv"], layer.behind["state"]) for layer in _layers(cache)]

    @torch.no_grad()
    def drop_bad_rows(self) -> None:
        """Let rows whose state is not finite begin with a fresh one."""
        for number, kept in enumerate(self._kept):
            if kept is not None:
                tensors = [x for _, x in _named(kept) if x.is_floating_point()]
                bad = torch.stack([x.isfinite().flatten(1).all(1).logical_not() for x in tensors]).any(0)
                pairs = zip(self._mixers, kept, strict=True)
                self._kept[number] = [_begin_rows(mixer, *layer, bad) for mixer, layer in pairs]

    def tensors(self, samples: int) -> dict[str, Tensor]:
        """Return the states by their names in a checkpoint after `samples` samples; none if all rows begin there."""
        _, place = self._chains.locate(np.arange(samples, samples + self._chains.rows))
        if not place.any():
            return {}
        found = {}
        for rows, kept in zip(self._rows.tolist(), self._kept, strict=True):
            for name, x in _named(kept or []):
                found[f"{KIND}:{name}:{rows[0]}"] = x
        return found

    def load(self, saved: SavedState, device: torch.device) -> None:
        """Take the states of a checkpoint, if it has any."""
        names = saved.names(KIND)
        if not names:
            return
        for number, rows in enumerate(self._rows.tolist()):
            tensors = {name: saved.read_rows(KIND, name, rows[0], len(rows)).to(device) for name in names}
            self._kept[number] = [_layer_of(tensors, i) for i in range(len(self._mixers))]


def open_states(
    model: nn.Module, chains: Chains | None, batching: Batching, seq_len: int, saved: Path | None
) -> CarriedStates | None:
    """Return the states of this rank's rows, or None if the data have no chains of samples.

    Args:
        model: the model of the run.
        chains, batching, seq_len: see `CarriedStates`.
        saved: the checkpoint whose states the rows continue from; None if they begin with fresh ones.
    """
    if chains is None:
        return None
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    states = CarriedStates(mixers, chains, batching, seq_len)
    if saved is not None:
        states.load(SavedState(saved), next(model.parameters()).device)
    return states


def check_states(model_config: LrnnConfig) -> None:
    """Raise UserError if a layer has a state that grows with the text, which cannot be carried on."""
    for layer, numbers in model_config.kinds_of_layers():
        if MIXERS[layer.mixer].cost(layer).state is None:
            raise UserError(
                f"data.state_passing: layer {numbers[0]} of the model, {layer.mixer}, keeps every token that it has "
                "read; give it a sliding_window, of which the keys and values are passed on, or leave out "
                "data.state_passing"
            )


def _layers(cache: LrnnCache) -> list[CarriedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CarriedLayer)]


def _detached(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(y.detach() for y in x)
    return None if x is None else x.detach()


def _begin_rows(mixer: Mixer, conv: Tensor | None, state: Any, begins: Tensor) -> tuple[Tensor | None, Any]:
    """Return the state of a layer with fresh rows, those of `begins`, bool [B] on any device."""
    example = state[0] if isinstance(state, tuple) else state
    begins = begins.to(example.device, non_blocking=True)
    return None if conv is None else zero_rows(conv, begins), mixer.begin_rows(state, begins)


def _named(kept: list[tuple[Tensor | None, Any]]) -> list[tuple[str, Tensor]]:
    """Return the tensors of the layers by name: "3.conv", "3.state", or "3.state.0" and so on for a tuple."""
    found = []
    for i, (conv, state) in enumerate(kept):
        if conv is not None:
            found.append((f"{i}.conv", conv))
        if isinstance(state, tuple):
            found += [(f"{i}.state.{j}", x) for j, x in enumerate(state)]
        else:
            found.append((f"{i}.state", state))
    return found


def _layer_of(tensors: dict[str, Tensor], i: int) -> tuple[Tensor | None, Any]:
    """Return the state of layer i from tensors with the names of `_named`."""
    parts = [tensors[name] for name in sorted(tensors) if name.startswith(f"{i}.state.")]
    return tensors.get(f"{i}.conv"), tuple(parts) if parts else tensors[f"{i}.state"]
