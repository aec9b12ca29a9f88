"""The mLSTM as a token mixer. Copied into exported folders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer, ShortConvolution, convolve, zero_at_padding
from .ops import diagonal_recurrence, document_starts
from .registry import Cost, Ranges, register

FAR = 1e4  # a log-decay after which nothing is left


@register("mlstm")
class MLSTM(Mixer):
    """The mLSTM (arXiv 2405.04517), with C_t transposed to [K, V]:

        C_t = f_t C_{t-1} + i_t k_t v_t^T        n_t = f_t n_{t-1} + i_t k_t
        h_t = C_t^T q_t / max(|n_t^T q_t|, 1)    i_t = exp(W_i x_t + b_i), f_t = sigmoid(W_f x_t + b_f), one per head

    then norm(h_t) sigmoid(W_g x_t), the norm over a head. k_t has the factor K^-0.5; q and k pass through a short
    convolution. For eigenvalues in [-1, 1] the forget gate is 2 f_t - 1, which is new here.

    Everything is kept divided by exp(m_t), m_t = max(log|f_t| + m_{t-1}, log i_t), m_0 = 0, so that no gate overflows;
    the result does not depend on m. The state in the cache is ([B, H, K, V + 1], which is C with n as its last
    column; m [B, H]).
    """

    title, paper = "mLSTM", "2405.04517"
    options = ("num_heads", "head_dim", "allow_neg_eigval", "conv_size", "gated_norm_eps")
    ranges = Ranges(negative="forget gate 2 f - 1", positive="forget gate f")
    gates = ("if_proj",)

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        hidden, heads, inner = config.hidden_size, config.num_heads, config.num_heads * config.head_dim
        numbers = inner * (config.head_dim + 1)  # the normaliser is one more column of C
        weights = 5 * hidden * inner + 2 * hidden * heads
        return Cost(weights, recurrence=2 * numbers, state=numbers + heads, channels=2 * inner)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.if_proj = nn.Linear(config.hidden_size, 2 * config.num_heads, bias=False)  # i of all heads, then f
        self.gate_bias = nn.Parameter(torch.empty(2, config.num_heads, dtype=torch.float32))
        self.q_conv1d = ShortConvolution(inner, config.conv_size)
        self.k_conv1d = ShortConvolution(inner, config.conv_size)
        self.o_norm = GatedRMSNorm(config.head_dim, config)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def reset_parameters(self):
        """Set b_i to 0, and b_f from 3 to 6 over the heads, as in the paper's code."""
        forget = torch.linspace(3, 6, self.heads[0], device=self.gate_bias.device)
        self.set_fresh("gate_bias", torch.stack([torch.zeros_like(forget), forget]))

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        x = zero_at_padding(x, mask)
        q, k = convolve(
            (self.q_conv1d, self.k_conv1d),
            (self.q_proj(x), self.k_proj(x)),
            cache,
            mask,
            cu_seqlens,
        )
        q, k, v, gate = (y.unflatten(-1, self.heads) for y in (q, k, self.v_proj(x), self.g_proj(x)))
        log_i, f = (self.if_proj(x).float().unflatten(-1, (2, -1)) + self.gate_bias.float()).unbind(-2)
        log_f = F.logsigmoid(f)
        if mask is not None:  # a padded step is the identity on the state: i = 0, f = 1
            log_i = log_i.masked_fill(~mask[..., None], float("-inf"))
            log_f = log_f * mask[..., None]
        g, sign = self.decay_in_range(log_f)
        before = self.read_state(cache)
        C, m_before = (None, None) if before is None else before
        m, shift = stabilizer(log_i, g, m_before, document)
        v = torch.cat([v.float(), v.new_ones(*v.shape[:-1], 1, dtype=torch.float32)], -1)
        o, C = diagonal_recurrence(
            q,
            self.heads[1] ** -0.5 * k.float() * (log_i - m).exp()[..., None],
            v,
            (g + shift)[..., None].clamp(max=0),  # at most 0 except for rounding
            None if sign is None else sign[..., None],
            initial_state=C,
            output_final_state=cache is not None,
            document=document,
        )
        self.write_state(cache, (C, m[:, -1]))
        h = o[..., :-1] / torch.maximum(o[..., -1:].abs(), (-m).exp()[..., None])
        h = self.o_norm(h.to(x.dtype), None, x.dtype) * gate.sigmoid()
        return self.o_proj(h.flatten(-2))


@torch.no_grad()
def stabilizer(log_i: Tensor, g: Tensor, before: Tensor | None, document: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return m_t = max(g_t + m_{t-1}, log_i_t) and m_{t-1} - m_t, both [B, T, H].

    Ahead of the first token m is `before` [B, H], or 0 if that is None. Ahead of every document it is 0.
    With G the running sum of g, m_t = G_t + max_{j <= t} (log_i_j - G_j).
    """
    g, log_i = g.double(), log_i.double()
    one = torch.zeros(g.shape[:2], dtype=torch.int64, device=g.device)
    start = document_starts(one if document is None else document)[..., None]
    first = torch.zeros_like(g)
    if before is not None:
        first[:, 0] = before.double()
    reached = torch.where(start, torch.maximum(g + first, log_i), log_i)
    G = torch.where(start, -FAR, g).cumsum(1)
    m = G + (reached - G).cummax(1).values
    previous = torch.where(start, first, torch.cat([m[:, :1], m[:, :-1]], 1))
    return m.float(), (previous - m).float()
