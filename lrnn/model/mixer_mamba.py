"""Mamba as a token mixer. Copied into exported folders."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import Mixer, ShortConvolution, convolve, zero_at_padding
from .ops import selective_scan
from .registry import Cost, Ranges, register


@register("mamba")
class Mamba(Mixer):
    """Mamba (arXiv 2312.00752, algorithm 2), with num_heads * head_dim channels of N = `state_size` numbers each:

        x = silu(conv(W_v u))        dt = softplus(W_dt W_r x + dt_bias)        (B, C) = W_B x, W_C x
        h_t = a_t h_{t-1} + dt_t B_t x_t        a_t = exp(-dt_t exp(A_log))        y_t = C_t^T h_t + D x_t

    then y silu(W_g u), without a norm. For eigenvalues in [-1, 1] a_t = 2 exp(-dt_t exp(A_log)) - 1, and the rest
    is unchanged (2411.12537).
    """

    title, paper = "Mamba", "2312.00752"
    options = ("num_heads", "head_dim", "allow_neg_eigval", "conv_size", "state_size")
    ranges = Ranges(negative="decay 2 exp(dt A) - 1", positive="decay exp(dt A)")
    begins_with_zeros = True
    gates = ("dt_proj",)

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        state = inner * config.state_size
        weights = 3 * hidden * inner + inner * (2 * math.ceil(hidden / 16) + 2 * config.state_size)
        return Cost(weights, recurrence=2 * state, state=state, channels=inner)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner, N = config.num_heads * config.head_dim, config.state_size
        self.widths = [math.ceil(config.hidden_size / 16), N, N]  # of W_r x, B, C
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_conv1d = ShortConvolution(inner, config.conv_size)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(self.widths[0], inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(inner, N, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner))
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def merged_rows(self) -> dict[str, list[int]]:
        return {"x_proj": self.widths}

    def head_widths(self) -> dict[str, int]:
        return {}  # every channel has a state of its own

    def reset_parameters(self):
        """Set A to 1..N per channel, step softplus(dt_bias) log-uniform in [0.001, 0.1], D to 1, as in the paper."""
        N = self.A_log.shape[1]
        self.set_fresh("A_log", torch.arange(1, N + 1, device=self.A_log.device).log().expand_as(self.A_log))
        self.set_fresh_steps("dt_bias")
        self.set_fresh("D", 1.0)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        x = zero_at_padding(x, mask)
        (v,) = convolve([self.v_conv1d], [self.v_proj(x)], cache, mask, cu_seqlens)
        low_rank, B, C = self.x_proj(v.to(x.dtype)).split(self.widths, -1)
        dt = F.softplus(self.dt_proj(low_rank).float() + self.dt_bias.float())
        dt = zero_at_padding(dt, mask)  # a padded step is the identity on the state: nothing written, a decay of 1
        A = -self.A_log.float().exp()
        self.note_eigenvalues(lambda: self._eigenvalues(dt, A))
        y, state = selective_scan(
            v,
            dt,
            A,
            B,
            C,
            allow_neg_eigval=self.allow_neg_eigval,
            initial_state=self.read_state(cache),
            document=document,
        )
        self.write_state(cache, state)
        y = (y + self.D.float() * v.float()) * F.silu(self.g_proj(x).float())
        return self.o_proj(y.to(x.dtype))

    def _eigenvalues(self, dt: Tensor, A: Tensor) -> Tensor:
        a = (dt[..., None] * A).exp()
        return 2 * a - 1 if self.allow_neg_eigval else a
