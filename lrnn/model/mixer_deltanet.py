"""DeltaNet and DeltaProduct, gated or not, as token mixers. Copied into exported folders."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .cache import LrnnCacheLayer
from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer, ShortConvolution, convolve, read_weight, zero_at_padding
from .ops import (
    fused_gated_delta_product,
    fused_gated_delta_rule,
    next_token,
    states_of_documents,
    states_of_rows,
    use_kernels,
)
from .registry import Cost, Ranges, register


class HeadSizes(NamedTuple):
    """Heads of a mixer and their sizes. Key head i serves the value heads i r to (i + 1) r - 1, r = HV / H.

    Attributes:
        H, HV: number of heads of queries and keys, and of values.
        K, V: size of a query or key, and of a value.
    """

    H: int
    HV: int
    K: int
    V: int

    @classmethod
    def equal(cls, heads: int, size: int) -> "HeadSizes":
        """Return as many key as value heads, all of one size."""
        return cls(heads, heads, size, size)

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.H * self.K

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.HV * self.V


@register("deltanet")
class DeltaNet(Mixer):
    """DeltaNet (arXiv 2406.06484), and the base of gated DeltaNet (2412.06464, equation 10) and, with
    n_h = `num_householder` factors per token, of (gated) DeltaProduct (2502.10297):

        S_t = prod_j (I - beta_tj k_tj k_tj^T) alpha_t S_{t-1} + what the factors write        o_t = K^-0.5 S_t^T q_t

    beta_tj = range * sigmoid(W_b x_t), with range 2 for eigenvalues in [-1, 1] and 1 for [0, 1] (2411.12537);
    log alpha_t = -exp(A_log) softplus(W_a x_t + dt_bias), 0 without a gate. The gate acts before the first factor,
    and the query reads after the last. Rows of the projections of k, v and b go by factor, then head, as in `fla`.
    Each value head has its own alpha, beta and state [K, V]; several may share a key head (`HeadSizes`).
    """

    title, paper = "DeltaNet", "2406.06484"
    options: tuple[str, ...] = (
        "num_heads",
        "head_dim",
        "num_value_heads",
        "head_v_dim",
        "gated_norm_eps",
        "allow_neg_eigval",
        "conv_size",
        "delta_rule_precision",
    )
    ranges = Ranges(negative="beta = 2 sigmoid", positive="beta = sigmoid")
    begins_with_zeros = True
    gates = ("b_proj", "a_proj")
    noted_eigenvalue = "eigenvalue 1 - beta"  # one for each factor
    fla_model_type: str | None = "delta_net"
    gated = False  # a gate alpha on the state, and one on the output
    several_factors = False  # `num_householder` factors per token instead of one

    @classmethod
    def factors(cls, config: LrnnConfig) -> int:
        """Return the number of factors per token."""
        return config.num_householder if cls.several_factors else 1

    @staticmethod
    def head_sizes(config: LrnnConfig) -> HeadSizes:
        """Return the heads of a configuration and their sizes."""
        return HeadSizes(
            H=config.num_heads,
            HV=config.num_heads if config.num_value_heads is None else config.num_value_heads,
            K=config.head_dim,
            V=config.head_dim if config.head_v_dim is None else config.head_v_dim,
        )

    @classmethod
    def check(cls, config: LrnnConfig) -> None:
        H, HV, _, _ = cls.head_sizes(config)
        if HV % H:
            raise ValueError(f"num_value_heads must be a multiple of num_heads, {H}; got {HV}")

    @classmethod
    def cost(cls, config: LrnnConfig) -> Cost:
        heads, factors = cls.head_sizes(config), cls.factors(config)
        channels = (1 + factors) * heads.keys + factors * heads.values  # q, and k and v of each factor
        # All rows of projections: these, the output gate, b of each factor and a; and the columns of o.
        rows = channels + (1 + cls.gated) * heads.values + (factors + cls.gated) * heads.HV
        state = heads.keys * heads.V * heads.HV // heads.H
        recurrence = (2 * factors + 1) * state
        return Cost(config.hidden_size * rows, recurrence=recurrence, state=state, channels=channels)

    @classmethod
    def details(cls, config: LrnnConfig) -> dict[str, str]:
        heads = cls.head_sizes(config)
        rows = {"Householder factors per token": str(cls.factors(config))} if cls.several_factors else {}
        if (heads.HV, heads.V) != (heads.H, heads.K):
            rows["value heads, value dimension"] = f"{heads.HV}, {heads.V}"
        return rows

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.num_householder = self.factors(config)
        self.precision = config.delta_rule_precision
        hidden, factors = config.hidden_size, self.num_householder
        _, HV, _, V = heads = self.head_sizes(config)
        self.value_heads = (HV, V)
        self.q_proj = nn.Linear(hidden, heads.keys, bias=False)
        self.k_proj = nn.Linear(hidden, factors * heads.keys, bias=False)
        self.v_proj = nn.Linear(hidden, factors * heads.values, bias=False)
        self.b_proj = nn.Linear(hidden, factors * HV, bias=False)
        self.q_conv1d = ShortConvolution(heads.keys, config.conv_size)
        self.k_conv1d = ShortConvolution(factors * heads.keys, config.conv_size)
        self.v_conv1d = ShortConvolution(factors * heads.values, config.conv_size)
        if self.gated:
            self.a_proj = nn.Linear(hidden, HV, bias=False)
            self.A_log = nn.Parameter(torch.empty(HV, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(HV, dtype=torch.float32))
            self.g_proj = nn.Linear(hidden, heads.values, bias=False)
        self.o_norm = GatedRMSNorm(V, config)
        self.o_proj = nn.Linear(heads.values, hidden, bias=False)

    def merged_rows(self) -> dict[str, list[int]]:
        (H, K), (HV, V), factors = self.heads, self.value_heads, self.num_householder
        return {"k_proj": [H * K] * factors, "v_proj": [HV * V] * factors}  # by factor

    def head_widths(self) -> dict[str, int]:
        V = self.value_heads[1]
        gate = {"g_proj": V} if self.gated else {}
        return {"q_proj": self.heads[1], "k_proj": self.heads[1], "v_proj": V, "o_proj": V} | gate

    def reset_parameters(self):
        """Set gates as Mamba-2 and `fla`: A uniform in (0, 16), step softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        if self.gated:
            # The lower bound keeps log A finite; a head with it decays by less than 1e-5 per step.
            self.set_fresh("A_log", torch.empty_like(self.A_log).uniform_(0, 16).clamp_(min=1e-4).log_())
            self.set_fresh_steps("dt_bias")

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        if self._is_next_token(x, cache, mask):
            return self._next_token(x, cache)
        x = zero_at_padding(x, mask)
        q, k, v = convolve(
            self._convolutions(), (self.q_proj(x), self.k_proj(x), self.v_proj(x)), cache, mask, cu_seqlens
        )
        b = self.b_proj(x)
        a = self.a_proj(x) if self.gated else None
        self.note_eigenvalues(partial(self._eigenvalues, b))
        if mask is not None:  # a padded step is the identity on the state: beta = 0 and a log-gate of 0
            b = b.masked_fill(~mask[..., None], float("-inf"))
            a = None if a is None else a.masked_fill(~mask[..., None], float("-inf"))
        rule = fused_gated_delta_rule
        by_factor: tuple[int, ...] = ()
        if self.num_householder > 1:
            rule, by_factor = fused_gated_delta_product, (self.num_householder,)
        q, k = q.unflatten(-1, self.heads), k.unflatten(-1, (*by_factor, *self.heads))
        v, b = v.unflatten(-1, (*by_factor, *self.value_heads)), b.unflatten(-1, (*by_factor, self.value_heads[0]))
        A_log, dt_bias = (self.A_log, self.dt_bias) if self.gated else (None, None)
        o, state = rule(
            q,
            k,
            v,
            a,
            b,
            A_log,
            dt_bias,
            beta_range=self.beta_range,
            initial_state=states_of_documents(self.read_state(cache), cu_seqlens, document),
            output_final_state=cache is not None,
            cu_seqlens=cu_seqlens,
            precision=self.precision,
        )
        self.write_state(cache, None if state is None else states_of_rows(state, document))
        gate = self.g_proj(x).unflatten(-1, self.value_heads) if self.gated else None
        return self.o_proj(self.o_norm(o, gate, x.dtype).flatten(-2))

    def _convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _is_next_token(self, x: Tensor, cache: LrnnCacheLayer | None, mask: Tensor | None) -> bool:
        """Return whether `next_token` computes what lies between the projections: in generation on a GPU."""
        if cache is None or cache.state is None or mask is not None or x.shape[1] > 1 or torch.is_grad_enabled():
            return False
        return use_kernels(x) and self.num_householder == 1 and self.on_eigenvalues is None

    def _next_token(self, x: Tensor, cache: LrnnCacheLayer) -> Tensor:
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        a, gate = (self.a_proj(x), self.g_proj(x)) if self.gated else (None, None)
        A_log, dt_bias = (self.A_log, self.dt_bias) if self.gated else (None, None)
        assert cache.conv is not None
        cache.state = cache.state.contiguous()  # is overwritten
        y, cache.conv = next_token(
            qkv,
            a,
            self.b_proj(x),
            gate,
            [read_weight(convolution) for convolution in self._convolutions()],
            cache.conv,
            cache.state,
            A_log,
            dt_bias,
            read_weight(self.o_norm),
            self.o_norm.eps,
            self.beta_range,
        )
        return self.o_proj(y)

    def _eigenvalues(self, b: Tensor) -> Tensor:
        return 1 - self.beta_range * b.float().sigmoid()


@register("gated_deltanet")
class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet: `DeltaNet` with a gate on the state and one on the output."""

    title, paper = "Gated DeltaNet", "2412.06464"
    fla_model_type = "gated_deltanet"
    gated = True


@register("deltaproduct")
class DeltaProduct(DeltaNet):
    """DeltaProduct: `DeltaNet` with several factors per token."""

    title, paper = "DeltaProduct", "2502.10297"
    fla_model_type = "gated_deltaproduct"
    several_factors = True
    options = (*DeltaNet.options, "num_householder")


@register("gated_deltaproduct")
class GatedDeltaProduct(DeltaNet):
    """Gated DeltaProduct: `DeltaNet` with several factors per token, and both gates."""

    title, paper = "Gated DeltaProduct", "2502.10297"
    fla_model_type = "gated_deltaproduct"
    gated = True
    several_factors = True
    options = (*DeltaNet.options, "num_householder")
