"""The parts that token mixers share: interface, norms and short convolution. Copied into exported folders."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import LrnnCacheLayer
from .configuration_lrnn import LrnnConfig
from .ops import document_ids, gated_rms_norm, plain_short_conv, rms_norm, short_conv, signed_decay, use_kernels
from .registry import Cost, Ranges


class Mixer(nn.Module):
    """A token mixer, the base class of all.

    A subclass has its own file `mixer_*.py`, is registered (see `registry.py`), and declares the attributes below. It
    imports tensor functions from `ops.py` only.
    """

    title: str  # as people write it
    paper: str  # arXiv number
    kind = "linear rnn"  # or "non-linear rnn", or "transformer"
    ranges: Ranges | None = None  # what `allow_neg_eigval` chooses; None if it has no eigenvalue range
    begins_with_zeros = False  # whether its state is one tensor, which is zero ahead of the first token
    fla_model_type: str | None = None  # the model of `fla` that has the same parameters and computes the same
    # Fields of the configuration that it reads beside those that every block reads; an entry of a pattern may set them.
    options: tuple[str, ...] = ("num_heads", "head_dim")
    matrices: tuple[str, ...] = ()  # names of its own parameters that are linear maps: they alone have weight decay
    # Its linear layers that make gates, decays or step sizes, and are narrow or of low rank: Muon leaves them to AdamW.
    gates: tuple[str, ...] = ()
    noted_eigenvalue = "eigenvalue of the state transition"  # what `note_eigenvalues` is given, for axes of plots
    cost: Callable[[LrnnConfig], Cost]  # a static or class method
    # If set, it is called in every forward pass with a function that returns the eigenvalues of the state transitions.
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
        cache: LrnnCacheLayer | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        """Mix tokens over time.

        Args:
            x: [B, T, hidden].
            cache: holds the layer's state ahead of x and is given the state after it. With documents, these are the
                states of the first and the last document of each row, and the cache `keeps_both_states`.
            mask: bool [B, T] or None, False at padding, which comes after the tokens of its row and leaves the state as
                it is.
            cu_seqlens: int32 [N + 1] or None, boundaries of documents in the flattened B * T tokens.
            document: `document_ids(cu_seqlens, B, T)`, int64 [B, T], or None. The state is reset at each document.

        Returns:
            [B, T, hidden] in the dtype of x.
        """
        raise NotImplementedError

    def read_state(self, cache: LrnnCacheLayer | None) -> Any:
        """Return the state ahead of the tokens, None for a fresh one."""
        return None if cache is None else cache.state

    def write_state(self, cache: LrnnCacheLayer | None, state: Any) -> None:
        if cache is not None:
            cache.state = state

    def begin_rows(self, state: Any, begins: Tensor) -> Any:
        """Return a state, not None, in which the rows that `begins`, bool [B], names are fresh."""
        if isinstance(state, tuple):
            return tuple(zero_rows(x, begins) for x in state)
        return zero_rows(state, begins)

    def reserve(self, cache: LrnnCacheLayer, tokens: int) -> None:
        """Give the cache, which has been read into, room for exactly that many tokens per row, those read included.

        Until they are read, its tensors keep their sizes. A state of fixed size needs no room.
        """

    def room(self, cache: LrnnCacheLayer) -> int | None:
        """Return the number of tokens per row that the cache has room for; None if it is any number."""
        return None

    def merged_rows(self) -> dict[str, list[int]]:
        """Return the rows of each matrix in the weights that hold several, one below the other, by linear layer."""
        return {}

    def head_widths(self) -> dict[str, int]:
        """Return the rows per head of the weights of linear layers, and the columns per head of that of `o_proj`."""
        names = ("q_proj", "k_proj", "v_proj", "r_proj", "g_proj", "o_proj")
        return {name: self.heads[1] for name in names if isinstance(getattr(self, name, None), nn.Linear)}

    def note_eigenvalues(self, compute: Callable[[], Tensor]) -> None:
        if self.on_eigenvalues is not None:
            self.on_eigenvalues(compute)

    def decay_in_range(self, log_a: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the decays a = exp(log_a) or, for eigenvalues in [-1, 1], 2a - 1, and note them as the eigenvalues.

        Returns:
            The logarithm of their sizes, and their signs, None if all are positive.
        """
        g, sign = signed_decay(log_a) if self.allow_neg_eigval else (log_a, None)
        self.note_eigenvalues(lambda: g.exp() if sign is None else sign * g.exp())
        return g, sign

    def reset_parameters(self):
        """Set the initial values of the parameters that belong to no module inside."""

    def set_fresh(self, name: str, value: Tensor | float) -> None:
        """Give a parameter its initial value, unless it has just been loaded from a file."""
        parameter = self.get_parameter(name)
        if not getattr(parameter, "_is_hf_initialized", False):
            with torch.no_grad():
                parameter.copy_(torch.as_tensor(value))

    def set_fresh_steps(self, name: str) -> None:
        """Do the same for biases of step sizes: softplus(bias) is log-uniform in [0.001, 0.1], as in Mamba."""
        dt = torch.empty_like(self.get_parameter(name)).uniform_(math.log(0.001), math.log(0.1)).exp_()
        self.set_fresh(name, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def zero_at_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x [B, T, ...] with zeros where `mask` is False."""
    return x if mask is None else x * mask.view(*mask.shape, *[1] * (x.ndim - 2)).to(x.dtype)


def zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return x [B, ...] with zeros in the rows that `rows`, bool [B], names."""
    return x.masked_fill(rows.view(-1, *[1] * (x.ndim - 1)), 0)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, or in float64 for an input in it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """norm(x) * silu(gate), or norm(x) without a gate, computed in float32 and returned in the given dtype."""

    def __init__(self, size: int, config: LrnnConfig):
        super().__init__(size, config.norm_eps if config.gated_norm_eps is None else config.gated_norm_eps)

    def forward(self, x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps).to(dtype)


class ShortConvolution(nn.Module):
    """The weight of a causal depthwise convolution over time, [D, 1, taps] as in `fla`. `convolve` applies it."""

    def __init__(self, size: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, taps))

    def reset_parameters(self):
        # PyTorch's default for a convolution with `taps` inputs per channel.
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)


def read_weight(module: "ShortConvolution | RMSNorm") -> Tensor:
    """Return the weight of a module that is not called, because one kernel computes what several modules do.

    If accelerate keeps it in a file or in other memory, it is fetched, as accelerate does where a module is called.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return module.weight
    hook.pre_forward(module)
    weight = module.weight
    hook.post_forward(module, None)
    return weight


def convolve(
    convolutions: Sequence[ShortConvolution],
    inputs: Sequence[Tensor],
    cache: LrnnCacheLayer | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Apply each convolution to its input. The inputs ahead come from the cache, and the last ones go into it.

    Args:
        convolutions: as many as inputs, with the same number of taps.
        inputs: one to three tensors [B, T, D_i] of one dtype.
        cache: the cache of the layer, or None for zeros ahead.
        mask: bool [B, T] or None, False at padding, which comes after the tokens of its row.
        cu_seqlens: int32 [N + 1], boundaries of documents; no tap reaches into another document. The inputs in the
            cache belong to the first document of each row.

    Returns:
        Tensors [B, T, D_i], on CPU in float32, on CUDA in the dtype of the inputs, where one kernel computes them all.
    """
    weights = [read_weight(convolution) for convolution in convolutions]
    taps = weights[0].shape[-1]
    before = pass_inputs(inputs, cache, taps, mask, cu_seqlens)
    if use_kernels(inputs[0]) and taps > 1:
        return short_conv(inputs, weights, before=before, cu_seqlens=cu_seqlens)
    outputs = plain_short_conv(inputs, weights, before=before, cu_seqlens=cu_seqlens)
    # A single tap is a product, which needs no kernel.
    return [y.to(x.dtype) for x, y in zip(inputs, outputs, strict=True)] if use_kernels(inputs[0]) else outputs


def pass_inputs(
    inputs: Sequence[Tensor], cache: LrnnCacheLayer | None, taps: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Sequence[Tensor] | None:
    """Return the inputs ahead of convolutions, which are in the cache, and put the last ones into it.

    The arguments are those of `convolve`. The result has a tensor [B, taps - 1, D_i] for each input, or is None.
    """
    if cache is None:
        return None
    window = cache.conv
    before = None if window is None else window.split([x.shape[-1] for x in inputs], -1)
    document = None if cu_seqlens is None else document_ids(cu_seqlens, *inputs[0].shape[:2])
    ends = inputs if mask is not None else [x[:, max(x.shape[1] - taps + 1, 0) :] for x in inputs]
    cache.conv = last_inputs(torch.cat(list(ends), -1), window, taps - 1, mask, document)
    return before


def last_inputs(x: Tensor, before: Tensor | None, count: int, mask: Tensor | None, document: Tensor | None) -> Tensor:
    """Return the last `count` steps of x [B, T, D], preceded by `before` [B, count, D], or by zeros if it is None.

    Padding, where `mask` [B, T] is False, comes last and is left out. Steps of another document than the last of their
    row are zeros. `document`, int64 with [B, at least T], is that of each token.
    """
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[-1])
    joined = torch.cat([before, x], 1)
    if document is not None:
        of_steps = torch.cat([document[:, :1].expand(-1, count), document], 1)[:, document.shape[1] :]
        other = of_steps != document[:, -1:]
        return joined[:, joined.shape[1] - count :].masked_fill(other[..., None], 0)
    if mask is None:
        return joined[:, joined.shape[1] - count :].clone()
    columns = mask.sum(1, keepdim=True) + torch.arange(count, device=x.device)
    return joined.gather(1, columns[..., None].expand(-1, -1, x.shape[-1]))
