"""Gated linear attention as a token mixer. Copied into exported folders."""

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer, zero_at_padding
from .ops import diagonal_recurrence
from .registry import Cost, Ranges, register

LOW_RANK = 16  # rank of the decay's projection
TEMPERATURE = 16  # decays near 1: sigmoid^(1/16)


@register("gla")
class GatedLinearAttention(Mixer):
    """GLA (arXiv 2312.06635, section 4):

        S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = K^-0.5 S_t^T q_t        a_t = sigmoid(W2 W1 x_t + b)^(1/16)

    then a norm of each head and an output gate, norm(o_t) silu(W_g x_t). There are no short convolutions. For
    eigenvalues in [-1, 1] the decay is 2 a_t - 1, which is new here.
    """

    title, paper = "Gated linear attention", "2312.06635"
    options = ("num_heads", "head_dim", "allow_neg_eigval", "gated_norm_eps")
    ranges = Ranges(negative="decay 2 a - 1", positive="decay a")
    begins_with_zeros = True
    gates = ("gk_proj",)

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        state = inner * config.head_dim
        return Cost(weights=5 * hidden * inner + LOW_RANK * (hidden + inner), recurrence=2 * state, state=state)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, LOW_RANK, bias=False), nn.Linear(LOW_RANK, inner, bias=True)
        )
        self.o_norm = GatedRMSNorm(config.head_dim, config)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        q, k, v, gate = (
            proj(x).unflatten(-1, self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        log_a = F.logsigmoid(self.gk_proj(x).float().unflatten(-1, self.heads)) / TEMPERATURE
        # A padded step is the identity on the state: nothing written, a decay of 1.
        k, log_a = zero_at_padding(k, mask), zero_at_padding(log_a, mask)
        g, sign = self.decay_in_range(log_a)
        o, state = diagonal_recurrence(
            q,
            k,
            v,
            g,
            sign,
            scale=self.heads[1] ** -0.5,
            initial_state=self.read_state(cache),
            output_final_state=cache is not None,
            document=document,
        )
        self.write_state(cache, state)
        return self.o_proj(self.o_norm(o.to(x.dtype), gate, x.dtype).flatten(-2))
