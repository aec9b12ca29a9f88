"""The sLSTM as a token mixer: a non-linear recurrence, for comparison. Copied into exported folders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer
from .ops import document_starts
from .registry import Cost, register

FRESH = -1e30  # m ahead of the first token, with which it writes c / n = tanh(z~) for any gates


@register("slstm")
class SLSTM(Mixer):
    """The sLSTM (arXiv 2405.04517), in which each head has its own recurrent matrix R:

        (z~, i~, f~, o~)_t = W x_t + R h_{t-1} + b
        c_t = f_t c_{t-1} + i_t tanh(z~_t)        n_t = f_t n_{t-1} + i_t        h_t = sigmoid(o~_t) c_t / n_t
        i_t = exp(i~_t), f_t = sigmoid(f~_t)

    then a norm over each head. It is not linear in its state, so it runs token by token and has no eigenvalue range.
    c and n are kept divided by exp(m_t), m_t = max(log f_t + m_{t-1}, i~_t). The state in the cache is (c, n, h, m),
    each [B, H, D] in float32.
    """

    title, paper = "sLSTM", "2405.04517"
    options = ("num_heads", "head_dim", "gated_norm_eps")
    kind = "non-linear rnn"
    matrices = ("recurrent",)

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        inner = config.num_heads * config.head_dim
        # h times the four recurrent matrices of each head.
        return Cost(5 * config.hidden_size * inner, recurrence=4 * inner * config.head_dim, state=4 * inner)

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        H, D = self.heads
        self.zifo_proj = nn.Linear(config.hidden_size, 4 * H * D, bias=False)
        self.recurrent = nn.Parameter(torch.empty(H, D, 4 * D))  # R, from h to z, i, f, o of the head
        self.gate_bias = nn.Parameter(torch.empty(H, 4 * D, dtype=torch.float32))
        self.o_norm = GatedRMSNorm(config.head_dim, config)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=False)

    def merged_rows(self) -> dict[str, list[int]]:
        H, D = self.heads
        return {"zifo_proj": [D] * (4 * H)}

    def reset_parameters(self):
        """Set R uniform within D^-0.5, as PyTorch's LSTM, b_f from 3 to 6 over a head's cells, other biases to 0."""
        D = self.heads[1]
        self.set_fresh("recurrent", torch.empty_like(self.recurrent).uniform_(-(D**-0.5), D**-0.5))
        bias = torch.zeros_like(self.gate_bias)
        bias[:, 2 * D : 3 * D] = torch.linspace(3, 6, D, device=bias.device)
        self.set_fresh("gate_bias", bias)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        H, D = self.heads
        inputs = self.zifo_proj(x).float().unflatten(-1, (H, 4 * D)) + self.gate_bias.float()
        fresh = (*(inputs.new_zeros(x.shape[0], H, D) for _ in range(3)), inputs.new_full((x.shape[0], H, D), FRESH))
        before = self.read_state(cache)
        state = fresh if before is None else before
        start = None if document is None else document_starts(document, before is not None)
        out = []
        with torch.autocast(x.device.type, enabled=False):
            R = self.recurrent.float()
            for t in range(x.shape[1]):
                if start is not None:
                    begins = start[:, t, None, None]
                    state = tuple(torch.where(begins, new, old) for new, old in zip(fresh, state, strict=True))
                after = step(state, inputs[:, t], R)
                if mask is not None:  # a padded step leaves the state as it is
                    real = mask[:, t, None, None]
                    after = tuple(torch.where(real, new, old) for new, old in zip(after, state, strict=True))
                state = after
                out.append(state[2])
        self.write_state(cache, state)
        h = torch.stack(out, 1).to(x.dtype)
        return self.o_proj(self.o_norm(h, None, x.dtype).flatten(-2))

    def begin_rows(self, state: tuple[Tensor, ...], begins: Tensor) -> tuple[Tensor, ...]:
        c, n, h, m = state
        return *super().begin_rows((c, n, h), begins), m.masked_fill(begins[:, None, None], FRESH)


def step(state: tuple[Tensor, ...], inputs: Tensor, R: Tensor) -> tuple[Tensor, ...]:
    """Return (c, n, h, m), each [B, H, D], after one token; `inputs` [B, H, 4 D] is W x + b, R is [H, D, 4 D]."""
    c, n, h, m = state
    z, i, f, o = (inputs + torch.einsum("bhd,hde->bhe", h, R)).chunk(4, -1)
    log_f = F.logsigmoid(f)
    m_new = torch.maximum(log_f + m, i)
    i, f = (i - m_new).exp(), (log_f + m - m_new).exp()
    c, n = f * c + i * z.tanh(), f * n + i
    return c, n, o.sigmoid() * c / n, m_new
