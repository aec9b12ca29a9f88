"""What token mixers share: norms, the short convolution, the cache, the interface. Copied into exported folders."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_lrnn import LrnnConfig
from .ops import gated_rms_norm, plain_short_conv, short_conv, signed_decay, use_kernels
from .registry import Cost, Ranges


class LrnnCache(Cache):
    """What generation carries on: for each layer the last inputs of the convolutions and the state of the mixer.

    But for the Transformer's, its size does not depend on the number of tokens read. It cannot be cropped: a recurrent
    state has no way back.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        self.layers: list = []  # read by transformers' Cache
        self.layer_class_to_replicate = None
        self.offloading = False
        self.reset_states(num_layers)

    def reset_states(self, num_layers: int):
        self.conv: list[Tensor | None] = [None] * num_layers  # [B, taps - 1, channels]
        # None, a tensor or a tuple of tensors, batch first; recurrent states are float32.
        self.state: list[Any] = [None] * num_layers
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.state)

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return self.seen_tokens

    def get_max_cache_shape(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return -1

    def get_max_length(self, *args, **kwargs) -> None:
        return None

    def reset(self):
        self.reset_states(len(self.state))

    def _apply(self, function):
        self.conv = [None if x is None else function(x) for x in self.conv]
        self.state = [
            tuple(function(y) for y in x) if isinstance(x, tuple) else None if x is None else function(x)
            for x in self.state
        ]

    def reorder_cache(self, beam_idx: Tensor):
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        self._apply(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor):
        self._apply(lambda x: x[indices])

    def crop(self, *args, **kwargs):
        raise NotImplementedError("a recurrent state cannot be rolled back, so its cache cannot be cropped")


class Mixer(nn.Module):
    """A token mixer: forward(x, cache, mask, cu_seqlens, document) -> [B, T, hidden] in the dtype of x.

    x [B, T, hidden]; `mask` bool [B, T] or None, False at padding, which leaves the state as it is; `document` int64
    [B, T] or None is `document_ids(cu_seqlens, B, T)`, and the state starts anew at each document. The state that comes
    after x goes into `cache`, which is never given together with documents.
    """

    title: str  # as people write it
    paper: str  # arXiv number
    kind = "linear rnn"  # or "non-linear rnn", or "transformer"
    ranges: Ranges | None = None  # what `allow_neg_eigval` chooses; None if it has no eigenvalue range
    begins_with_zeros = False  # whether its state is one tensor, which is zero ahead of the first token
    fla_model_type: str | None = None  # the model of `fla` that has the same parameters and computes the same
    noted_eigenvalue = "eigenvalue of the state transition"  # what `note_eigenvalues` is given, for axes of plots
    cost: Callable[[LrnnConfig], Cost]  # a static or class method
    # Where set, called in every forward pass with a function that returns the eigenvalues of the state transitions.
    on_eigenvalues: Callable[[Callable[[], Tensor]], None] | None = None

    @classmethod
    def check(cls, config: LrnnConfig) -> None:
        """Raise ValueError if the mixer cannot have this configuration."""

    @classmethod
    def details(cls, config: LrnnConfig) -> dict[str, str]:
        """Return settings of this mixer alone that a model card shows, by what they are."""
        return {}

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = (config.num_heads, config.head_dim)
        self.allow_neg_eigval = config.allow_neg_eigval

    def forward(
        self,
        x: Tensor,
        cache: LrnnCache | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        raise NotImplementedError

    def read_state(self, cache: LrnnCache | None) -> Any:
        """The state ahead of the tokens, None for a fresh one."""
        return None if cache is None else cache.state[self.layer_idx]

    def write_state(self, cache: LrnnCache | None, state: Any) -> None:
        if cache is not None:
            cache.state[self.layer_idx] = state

    def note_eigenvalues(self, compute: Callable[[], Tensor]) -> None:
        if self.on_eigenvalues is not None:
            self.on_eigenvalues(compute)

    def decay_in_range(self, log_a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-size and sign (None where all are positive) of the decays a = exp(log_a) or, for eigenvalues in [-1, 1],
        2a - 1. They are noted as the eigenvalues."""
        g, sign = signed_decay(log_a) if self.allow_neg_eigval else (log_a, None)
        self.note_eigenvalues(lambda: g.exp() if sign is None else sign * g.exp())
        return g, sign

    def reset_parameters(self):
        """Initial values of the parameters that belong to no module inside."""

    def set_fresh(self, name: str, value: Tensor | float) -> None:
        """Give a parameter its initial value, unless it has just been loaded from a file."""
        parameter = self.get_parameter(name)
        if not getattr(parameter, "_is_hf_initialized", False):
            with torch.no_grad():
                parameter.copy_(torch.as_tensor(value))

    def set_fresh_steps(self, name: str) -> None:
        """Likewise for biases of step sizes: softplus(bias) is log-uniform in [0.001, 0.1], as in Mamba."""
        dt = torch.empty_like(self.get_parameter(name)).uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.set_fresh(name, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def zero_at_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, T, ...] with zeros where `mask` is False."""
    return x if mask is None else x * mask.view(*mask.shape, *[1] * (x.ndim - 2)).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """norm(x) * silu(gate), or without a gate norm(x) alone, in float32; the result has the given dtype."""

    def forward(self, x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps).to(dtype)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU, summed in float32. Weight [D, 1, taps], as in `fla`."""

    def __init__(self, size: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))

    def reset_parameters(self):
        # PyTorch's default for a convolution with `taps` inputs a channel.
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


def convolve(
    convolutions: Sequence[ShortConvolution],
    inputs: Sequence[Tensor],
    cache: LrnnCache | None,
    layer_idx: int,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Apply each convolution to its input. The inputs ahead come from the cache, and the last ones go into it.

    Args:
        convolutions: as many as inputs, with the same number of taps.
        inputs: one to three tensors [B, T, D_i] of one dtype.
        cache: the cache of the model, or None for zeros ahead.
        layer_idx: the layer's place in the cache.
        cu_seqlens: int32 [N + 1], boundaries of documents; no tap reaches into another document.

    Returns:
        Tensors [B, T, D_i], on CPU in float32, on CUDA in the dtype of the inputs, where one kernel computes them all.
    """
    before: Sequence[Tensor] | None = None
    weights = [convolution.weight for convolution in convolutions]
    taps = weights[0].shape[-1]
    if cache is not None:
        window = cache.conv[layer_idx]
        if window is not None:
            before = window.split([x.shape[-1] for x in inputs], -1)
        cache.conv[layer_idx] = last_inputs(torch.cat(list(inputs), -1), window, taps - 1)
    if use_kernels(inputs[0]) and taps > 1:
        return short_conv(inputs, weights, before=before, cu_seqlens=cu_seqlens)
    outputs = plain_short_conv(inputs, weights, before=before, cu_seqlens=cu_seqlens)
    # A single tap is a product, which needs no kernel.
    return [y.to(x.dtype) for x, y in zip(inputs, outputs, strict=True)] if use_kernels(inputs[0]) else outputs


def last_inputs(x: Tensor, before: Tensor | None, count: int) -> Tensor:
    """The last `count` steps of x [B, T, D], those `before` [B, count, D] ahead of it; zeros where there are none."""
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[-1])
    joined = torch.cat([before, x], 1)
    return joined[:, joined.shape[1] - count :].clone()
