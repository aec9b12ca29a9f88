"""RWKV-7 as a token mixer. Copied into exported folders."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import GatedRMSNorm, Mixer, last_inputs, zero_at_padding
from .ops import document_starts, rwkv7_recurrence
from .registry import Cost, Ranges, register

INPUTS = "rwkvag"  # the inputs with a token shift of their own: receptance, decay, key, value, in-context rate, gate
LOW_RANK = 32  # rank of the projections of decay, rate and gate


@register("rwkv7")
class RWKV7(Mixer):
    """The time mixing of RWKV-7 (arXiv 2503.14456), with the state transposed to [K, V]:

        x^c_t = x_t + mu_c (x_{t-1} - x_t)        for c of r, w, k, v, a, g
        r = W_r x^r, k = W_k x^k, v = W_v x^v     w = exp(-e^-0.5 sigmoid(low-rank tanh(x^w)))
        a = sigmoid(low-rank(x^a))                g = W sigmoid(W' x^g)
        kappa = (k . xi) / |k . xi|               k' = k . (1 + alpha (a - 1))
        S_t = (diag(w_t) - (c_t a_t . kappa_t) kappa_t^T) S_{t-1} + k'_t v_t^T
        y_t = norm(S_t^T r_t) + (r_t . rho . k'_t summed) v_t, times g_t

    c_t is 1 in the paper. For eigenvalues in [-1, 1] the in-context rate should be doubled, as DeltaNet's beta is. But
    here the decay is added to the removal instead of acting before it, and the least eigenvalue can be as low as
    min(w) - c. So c_t = 1 + min_i w_ti, per head and token, which is 2 where nothing decays. That is new here. (The
    paper's appendix has a constant c, below 1 + the least possible decay.) With c_t = 1 and decay, eigenvalues go below
    0 too, down to min(w) - 1 > -0.46: the range [0, 1] is exact only where nothing decays.
    Unlike the paper's, the norm over a head is an RMS norm, and no value is carried from the first layer to others.
    """

    title, paper = "RWKV-7", "2503.14456"
    options = ("num_heads", "head_dim", "allow_neg_eigval", "gated_norm_eps")
    ranges = Ranges(
        negative="in-context rate times 1 + min(w)",
        positive="in-context rate a; with decay w down to min(w) - 1",
    )
    gates = ("w_proj", "a_proj", "g_proj")

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        state = inner * config.head_dim
        weights = 4 * hidden * inner + 3 * LOW_RANK * (hidden + inner)
        return Cost(weights, recurrence=4 * state, state=state)  # reads with kappa and r, writes with c a kappa and k'

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        self.depth = layer_idx / config.num_hidden_layers  # 0 in the first layer
        self.shift_mix = nn.Parameter(torch.empty(len(INPUTS), 1, 1, hidden))
        self.r_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.w_proj = nn.Sequential(nn.Linear(hidden, LOW_RANK, bias=False), nn.Tanh(), nn.Linear(LOW_RANK, inner))
        self.a_proj = nn.Sequential(nn.Linear(hidden, LOW_RANK, bias=False), nn.Linear(LOW_RANK, inner))
        self.g_proj = nn.Sequential(
            nn.Linear(hidden, LOW_RANK, bias=False), nn.Sigmoid(), nn.Linear(LOW_RANK, inner, bias=False)
        )
        self.k_k = nn.Parameter(torch.empty(inner))  # xi
        self.k_a = nn.Parameter(torch.empty(inner))  # alpha
        self.r_k = nn.Parameter(torch.empty(inner))  # rho
        self.o_norm = GatedRMSNorm(config.head_dim, config)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def reset_parameters(self):
        """Set shifts by channel and depth, and decays from slow to fast over the channels, as in the authors' code."""
        inner, hidden = self.k_k.shape[0], self.shift_mix.shape[-1]
        device = self.k_k.device
        channel = torch.arange(hidden, device=device) / hidden
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        mix = torch.stack([1 - channel ** (powers[name] * (1 - self.depth)) for name in INPUTS])
        self.set_fresh("shift_mix", mix[:, None, None])
        along = torch.linspace(0, 1, inner, device=device)
        self.set_fresh("w_proj.2.bias", -5.5 + 6 * along ** (1 + self.depth**0.3))
        self.set_fresh("a_proj.1.bias", -0.19 + 0.4 * (along - 0.5))
        self.set_fresh("k_k", 0.71 - 0.1 * (along - 0.5))
        self.set_fresh("k_a", 1.02)
        self.set_fresh("r_k", -0.04)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        x = zero_at_padding(x, mask)
        before = None if cache is None else cache.conv
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1] if before is None else torch.cat([before.to(x.dtype), x], 1)[:, :-1]
        if document is not None:
            previous = previous * ~document_starts(document, before is not None)[..., None]
        if cache is not None:
            cache.conv = last_inputs(x, before, 1, mask, document)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (previous - x) * self.shift_mix.to(x.dtype)).unbind(0)
        # The recurrence may run in the dtype of r.
        r, k, v = (y.unflatten(-1, self.heads) for y in (self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)))
        k, v = k.float(), v.float()
        log_w = -math.exp(-0.5) * self.w_proj(x_w).float().sigmoid().unflatten(-1, self.heads)
        a = self.a_proj(x_a).float().sigmoid().unflatten(-1, self.heads)
        k_k, k_a, r_k = (y.float().view(self.heads) for y in (self.k_k, self.k_a, self.r_k))
        kappa = F.normalize(k * k_k, dim=-1)
        k = k * (1 + k_a * (a - 1))
        w = log_w.exp()
        rate = a * (1 + w.amin(-1, keepdim=True)) if self.allow_neg_eigval else a
        if mask is not None:  # a padded step is the identity on the state: w = 1, nothing removed, nothing written
            real = mask[..., None, None]
            w, rate, k = torch.where(real, w, 1), rate * real, k * real
        self.note_eigenvalues(lambda: rayleigh_quotient(w, rate, kappa))
        o, state = rwkv7_recurrence(
            r,
            w,
            k,
            v,
            kappa,
            rate,
            initial_state=self.read_state(cache),
            cu_seqlens=cu_seqlens,
        )
        self.write_state(cache, state)
        o = self.o_norm(o.to(x.dtype), None, x.dtype) + ((r * k * r_k).sum(-1, keepdim=True) * v).to(x.dtype)
        return self.o_proj(o.flatten(-2) * self.g_proj(x_g))


def rayleigh_quotient(w: Tensor, rate: Tensor, kappa: Tensor) -> Tensor:
    """Return u^T M u / u^T u [B, T, H] for the symmetric matrix M = diag(w) - u u^T, u = sqrt(rate) kappa.

    M has the eigenvalues of the transition. The quotient lies between the least and the largest of them, and is the
    eigenvalue along u if all w are equal.
    """
    square = rate * kappa**2
    return (square * w).sum(-1) / square.sum(-1).clamp(min=1e-12) - square.sum(-1)
