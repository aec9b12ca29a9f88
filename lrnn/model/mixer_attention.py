"""Softmax attention as a token mixer, for comparison. Copied into exported folders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_lrnn import LrnnConfig
from .layers import Mixer
from .registry import Cost, register

ROTARY_BASE = 10_000.0


@register("transformer")
class Attention(Mixer):
    """Causal multi-head attention (arXiv 1706.03762) with rotary positions (2104.09864). It has no eigenvalue range.

    Its state in the cache is (keys [B, H, S, D], values [B, H, S, D], bool [B, S] that is False at padding).
    """

    title, paper = "Softmax attention with rotary positions", "1706.03762"
    kind = "transformer"

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        inner = config.num_heads * config.head_dim
        # Scores and sums over the tokens before: half the sequence on average.
        recurrence = (config.max_position_embeddings + 1) * inner
        return Cost(weights=4 * config.hidden_size * inner, recurrence=recurrence, state=None)

    @staticmethod
    def check(config: LrnnConfig) -> None:
        if config.head_dim % 2:
            raise ValueError(f"head_dim of a transformer must be even, for rotary positions; got {config.head_dim}")

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, self.heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        T = x.shape[1]
        before = self.read_state(cache)
        start = 0 if before is None else before[0].shape[2]
        seen = mask
        if cache is not None:
            seen = x.new_ones(x.shape[0], T, dtype=torch.bool) if mask is None else mask
            if before is not None:
                seen = torch.cat([before[2], seen], 1)
        # Positions do not count padding. They continue across documents, since only their differences matter.
        position = torch.arange(T, device=x.device)[None] if before is None else (seen.cumsum(1) - 1)[:, -T:]
        q, k = rotate(q, position), rotate(k, position)
        if before is not None:
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        self.write_state(cache, (k, v, seen))
        if start == 0 and mask is None and document is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_pattern(T, start, seen, document, x.device))
        return self.o_proj(o.transpose(1, 2).flatten(-2))


def attention_pattern(T: int, start: int, seen: Tensor | None, document: Tensor | None, device: torch.device) -> Tensor:
    """Return which tokens each token sees: bool [1 or B, 1, T, start + T].

    A token sees no later token, no padding and no other document. It always sees itself, so that no row is empty.

    Args:
        T: number of tokens.
        start: number of tokens before them.
        seen: bool [B, start + T] that is False at padding, or None.
        document: int64 [B, T], the document of each token, or None. Only with start = 0.
        device: of the result.
    """
    position = torch.arange(start + T, device=device)
    ahead = position[start:, None] - position
    sees = (ahead >= 0)[None, None]
    if seen is not None:
        sees = sees & seen[:, None, None, :]
    if document is not None:
        sees = sees & (document[:, None, :, None] == document[:, None, None, :])
    return sees | (ahead == 0)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Apply rotary positions [B or 1, T] to x [B, H, T, D].

    Each pair of channels (i, i + D/2) is rotated by the angle position / base^(2i/D).
    """
    D = x.shape[-1]
    frequency = ROTARY_BASE ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
