"""Mamba-2 as a token mixer. Copied into exported folders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer, ShortConvolution, convolve, zero_at_padding
from .ops import diagonal_recurrence
from .registry import Cost, Ranges, register


@register("mamba2")
class Mamba2(Mixer):
    """Mamba-2 (arXiv 2405.21060, section 7), with q, k, v for its C, B, x:

        S_t = a_t S_{t-1} + dt_t k_t v_t^T        o_t = S_t^T q_t + D v_t
        dt_t = softplus(W_a x_t + dt_bias)        a_t = exp(-exp(A_log) dt_t), one number per head

    then norm(o_t) silu(W_g x_t), the norm over a head. q and k, of size `head_dim`, are shared by the heads; q, k and v
    pass through a short convolution. For eigenvalues in [-1, 1] the decay is 2 a_t - 1 and dt_t k_t is unchanged.
    arXiv 2411.12537 does so for Mamba-1; for Mamba-2 it is new here.
    """

    title, paper = "Mamba-2", "2405.21060"
    options = ("num_heads", "head_dim", "allow_neg_eigval", "conv_size", "gated_norm_eps")
    ranges = Ranges(negative="decay 2 a - 1", positive="decay a")
    begins_with_zeros = True
    gates = ("a_proj",)

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        inner, state = heads * dim, heads * dim * dim
        weights = 3 * hidden * inner + 2 * hidden * dim + hidden * heads
        return Cost(weights, recurrence=2 * state, state=state, channels=inner + 2 * dim)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.q_conv1d = ShortConvolution(config.head_dim, config.conv_size)
        self.k_conv1d = ShortConvolution(config.head_dim, config.conv_size)
        self.v_conv1d = ShortConvolution(inner, config.conv_size)
        self.A_log = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.o_norm = GatedRMSNorm(config.head_dim, config)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def reset_parameters(self):
        """Set A uniform in (1, 16), step softplus(dt_bias) log-uniform in [0.001, 0.1], D to 1, as the paper's code."""
        self.set_fresh("A_log", torch.empty_like(self.A_log).uniform_(1, 16).log_())
        self.set_fresh_steps("dt_bias")
        self.set_fresh("D", 1.0)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        x = zero_at_padding(x, mask)
        q, k, v = convolve(
            (self.q_conv1d, self.k_conv1d, self.v_conv1d),
            (self.q_proj(x), self.k_proj(x), self.v_proj(x)),
            cache,
            mask,
            cu_seqlens,
        )
        q, k = (y[:, :, None].expand(-1, -1, self.heads[0], -1) for y in (q, k))
        v = v.unflatten(-1, self.heads)
        dt = F.softplus(self.a_proj(x).float() + self.dt_bias.float())[..., None]
        dt = zero_at_padding(dt, mask)  # a padded step is the identity on the state: nothing written, a decay of 1
        log_a = -self.A_log.float().exp()[:, None] * dt
        g, sign = self.decay_in_range(log_a)
        o, state = diagonal_recurrence(
            q,
            dt * k,
            v,
            g,
            sign,
            initial_state=self.read_state(cache),
            output_final_state=cache is not None,
            document=document,
        )
        self.write_state(cache, state)
        o = o + self.D.float()[:, None] * v.float()
        gate = self.g_proj(x).unflatten(-1, self.heads)
        return self.o_proj(self.o_norm(o.to(x.dtype), gate, x.dtype).flatten(-2))
