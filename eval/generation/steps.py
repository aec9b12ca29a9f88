"""Several greedy decoding steps on tensors that stay in their place, and the CUDA graph of them.

A step of a 1.3B model launches about 600 kernels, which take the host longer than the GPU. A CUDA graph launches all
kernels of several steps at once. It reads and writes the memory that it was recorded with, so the state is copied into
fixed tensors, once per replay.
"""

from typing import Any

import torch
from torch import Tensor


class DecodingSteps:
    """`count` greedy steps of a model for one batch, each of which reads the token that the step before has chosen.

    On a GPU the first call runs the steps one by one, which compiles what is not compiled yet. The second call records
    them as a CUDA graph; it and all later ones replay the graph. On a CPU all calls run the steps one by one.

    Attributes:
        token: int64 [B, 1], the last token that was chosen, which the model has not read yet.
        chosen: int64 [B, count], the tokens that the last call has chosen.
    """

    def __init__(self, model: Any, cache: Any, token: Tensor, count: int):
        self._model, self._cache = model, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(token.device) if token.is_cuda else None
        self._warm = False
        self.token = token.clone()
        self.chosen = token.new_zeros(token.shape[0], count)
        self._kept = [tensor.clone() for tensor in state_tensors(cache)]

    @property
    def batch_size(self) -> int:
        """Return the number of sequences."""
        return self.token.shape[0]

    def start(self, cache: Any, token: Tensor) -> None:
        """Begin other texts, from the state in `cache` and its next token, int64 [B, 1]."""
        self.token.copy_(token)
        overwrite(self._kept, state_tensors(cache))

    def run(self) -> Tensor:
        """Return the next `count` tokens of each sequence, int64 [B, count]. The next call overwrites them."""
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
        return self.chosen

    def _run_steps(self) -> None:
        put_state(self._cache, self._kept)
        token = self.token
        for i in range(self.chosen.shape[1]):
            logits = self._model(token, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].float().argmax(-1, keepdim=True)
            self.chosen[:, i : i + 1] = token
        self.token.copy_(token)
        overwrite(self._kept, state_tensors(self._cache))


def state_tensors(cache: Any) -> list[Tensor]:
    """Return the tensors that a cache carries from token to token: of each layer the window of inputs and the state."""
    tensors = []
    for layer in cache.layers:
        state = layer.state if isinstance(layer.state, tuple) else (layer.state,)
        tensors += [x for x in (layer.conv, *state) if x is not None]
    return tensors


def put_state(cache: Any, tensors: list[Tensor]) -> None:
    """Let the cache hold these tensors, which `state_tensors` returned for a cache of the same model."""
    rest = iter(tensors)
    for layer in cache.layers:
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
        old.copy_(tensor)
