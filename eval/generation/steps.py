"""Several greedy decoding steps on tensors that stay in their place, and the CUDA graph of them.

A step of a 1.3B model launches about 600 kernels, which take the host longer than the GPU. A CUDA graph launches all
kernels of several steps at once. It reads and writes the memory that it was recorded with, so the state is copied into
fixed tensors, once per replay.
"""

from typing import Any

import torch
from torch import Tensor

ROOM = 256  # the number of tokens that keys and values have room for is a multiple, so that similar texts share a graph


class DecodingSteps:
    """`count` greedy steps of a model for one batch, each of which reads the token that the step before has chosen.

    On a GPU the first call runs the steps one by one, which compiles what is not compiled yet. The second call records
    them as a CUDA graph; it and all later ones replay the graph. On a CPU all calls run the steps one by one.

    The keys and values of attention have room for a number of tokens, beyond which the graph is recorded again with
    room for twice as many.

    Args:
        model: a model of lrnn with a head.
        cache: the state after the prompts.
        token: int64 [B, 1], the tokens that follow them.
        count: steps per call.
        tokens: tokens per text, prompt included, that keys and values get room for.

    Attributes:
        token: int64 [B, 1], the last token that was chosen, which the model has not read yet.
        chosen: int64 [B, count], the tokens that the last call has chosen.
    """

    def __init__(self, model: Any, cache: Any, token: Tensor, count: int, tokens: int):
        self._model, self._cache = model, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm: bool = False
        self._stream = torch.cuda.Stream(token.device) if token.is_cuda else None
        self.token = token.clone()
        self.chosen = token.new_zeros(token.shape[0], count)
        self._read: int = cache.get_seq_length()
        self._make_room(tokens)

    @property
    def batch_size(self) -> int:
        """Return the number of sequences."""
        return self.token.shape[0]

    def start(self, cache: Any, token: Tensor, tokens: int) -> None:
        """Begin other texts of up to `tokens` tokens, from the state in `cache` and its next token, int64 [B, 1]."""
        self.token.copy_(token)
        self._read = cache.get_seq_length()
        if self._room is None or tokens <= self._room:
            reserve(self._model, cache, self._tokens)
            overwrite(self._kept, state_tensors(cache))
        else:
            self._cache = cache
            self._make_room(tokens)

    def run(self) -> Tensor:
        """Return the next `count` tokens of each sequence, int64 [B, count]. The next call overwrites them."""
        count = self.chosen.shape[1]
        if self._room is not None and self._read + count > self._room:
            put_state(self._cache, self._kept, self._read)
            self._make_room(2 * self._tokens + count)
        if self._stream is None:
            self._run_steps()
        elif not self._warm:
            # Libraries keep a workspace per stream, so the steps run on the stream that will record them.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run_steps()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._warm = True
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._run_steps()
            self._graph.replay()
        self._read += count
        return self.chosen

    def _make_room(self, tokens: int) -> None:
        """Keep the state of the cache, in new tensors with room for that many tokens per text."""
        self._graph, self._warm = None, False
        self._tokens: int = -(-tokens // ROOM) * ROOM
        reserve(self._model, self._cache, self._tokens)
        self._room = room_of(self._model, self._cache)
        self._kept = [tensor.clone() for tensor in state_tensors(self._cache)]

    def _run_steps(self) -> None:
        put_state(self._cache, self._kept, self._read)
        token = self.token
        for i in range(self.chosen.shape[1]):
            logits = self._model(token, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].float().argmax(-1, keepdim=True)
            self.chosen[:, i : i + 1] = token
        self.token.copy_(token)
        overwrite(self._kept, state_tensors(self._cache))


def reserve(model: Any, cache: Any, tokens: int) -> None:
    """Give the keys and values of a cache room for that many tokens per text, those that it has read included."""
    for block, layer in zip(model.model.layers, cache.layers, strict=True):
        block.attn.reserve(layer, tokens)


def room_of(model: Any, cache: Any) -> int | None:
    """Return the number of tokens per text that a cache has room for; None if it is any number."""
    pairs = zip(model.model.layers, cache.layers, strict=True)
    rooms = [room for block, layer in pairs if (room := block.attn.room(layer)) is not None]
    return min(rooms, default=None)


def state_tensors(cache: Any) -> list[Tensor]:
    """Return the tensors that a cache carries from token to token: of each layer the window of inputs and the state."""
    tensors = []
    for layer in cache.layers:
        state = layer.state if isinstance(layer.state, tuple) else (layer.state,)
        tensors += [x for x in (layer.conv, *state) if x is not None]
    return tensors


def put_state(cache: Any, tensors: list[Tensor], read: int) -> None:
    """Let the cache hold these tensors, which `state_tensors` returned for a cache of the same model.

    Args:
        cache: the cache.
        tensors: the state.
        read: number of tokens per text that it has read.
    """
    rest = iter(tensors)
    for layer in cache.layers:
        layer.seen_tokens = read
        layer.conv = None if layer.conv is None else next(rest)
        if isinstance(layer.state, tuple):
            layer.state = tuple(next(rest) for _ in layer.state)
        elif layer.state is not None:
            layer.state = next(rest)


def overwrite(kept: list[Tensor], new: list[Tensor]) -> None:
    """Copy each tensor of `new` into the one of `kept`.

    Raises:
        RuntimeError: they differ in shape or dtype, so that the copies would not be the state.
    """
    for old, tensor in zip(kept, new, strict=True):
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            raise RuntimeError(
                f"the state has changed from {list(old.shape)} {old.dtype} to {list(tensor.shape)} {tensor.dtype}; "
                "decoding on fixed tensors needs a state of one size"
            )
        if old is not tensor:  # keys and values are written in place
            old.copy_(tensor)
