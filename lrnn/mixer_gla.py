"""Gated linear attention as a token mixer. Copied into exported folders."""

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers_lrnn import GatedRMSNorm, LrnnCache, Mixer

try:
    from lrnn.kernels.diagonal_recurrence import signed_decay
    from lrnn.kernels.recurrences import diagonal_recurrence
except ImportError:  # an exported folder, loaded where lrnn is not installed
    from .diagonal_recurrence import (  # type: ignore[import-not-found, no-redef]
        diagonal_recurrence,
        signed_decay,
    )

LOW_RANK = 16  # of the decay's projection
TEMPERATURE = 16  # decays near 1: sigmoid^(1/16)


class GatedLinearAttention(Mixer):
    """GLA (arXiv 2312.06635, section 4):

        S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = K^-0.5 S_t^T q_t        a_t = sigmoid(W2 W1 x_t + b)^(1/16)

    then a norm of each head and an output gate, norm(o_t) silu(W_g x_t). There are no short convolutions. For
    eigenvalues in [-1, 1] the decay is 2 a_t - 1, which is new here.
    """

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(layer_idx)
        self.heads = (config.num_heads, config.head_dim)
        self.allow_neg_eigval = config.allow_neg_eigval
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, LOW_RANK, bias=False), nn.Linear(LOW_RANK, inner, bias=True)
        )
        self.o_norm = GatedRMSNorm(config.head_dim, config.norm_eps)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cache: LrnnCache | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        q, k, v, gate = (
            proj(x).unflatten(-1, self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        )
        log_a = F.logsigmoid(self.gk_proj(x).float().unflatten(-1, self.heads)) / TEMPERATURE
        if mask is not None:  # a padded step is the identity on the state: nothing written, a decay of 1
            k = k * mask[..., None, None]
            log_a = log_a * mask[..., None, None]
        g, sign = signed_decay(log_a) if self.allow_neg_eigval else (log_a, None)
        self.note_eigenvalues(lambda: g.exp() if sign is None else sign * g.exp())
        o, state = diagonal_recurrence(
            q,
            k,
            v,
            g,
            sign,
            scale=self.heads[1] ** -0.5,
            initial_state=None if cache is None else cache.state[self.layer_idx],
            output_final_state=cache is not None,
            document=document,
        )
        if cache is not None:
            cache.state[self.layer_idx] = state
        return self.o_proj(self.o_norm(o.to(x.dtype), gate, x.dtype).flatten(-2))
