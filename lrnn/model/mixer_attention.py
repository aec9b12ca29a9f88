"""Softmax attention as a token mixer. Copied into exported folders."""

from typing import Any

from torch import Tensor, nn

from .attention import attend
from .cache import LrnnCacheLayer
from .configuration_lrnn import LrnnConfig
from .key_values import attend_and_write, first_state, slots_for, with_room, with_slots
from .layers import Mixer, RMSNorm
from .ops import rotate
from .positions import positions, turns
from .registry import Cost, register
from .rope_scaling import check_scaling

QK_NORMS = ("head", "projection")


@register("attention", "transformer")  # the second is its name in lrnn 0.1.0
class Attention(Mixer):
    """Causal softmax attention (arXiv 1706.03762), with what models since have added, each of it an option:

    num_kv_heads: fewer key and value heads than query heads, as in Llama (grouped queries, 2305.13245);
    rope_theta: the base of rotary positions (2104.09864), or None for no positions;
    rope_scaling: other angles for texts longer than those of training, see `rope_scaling.py`;
    qk_norm: an RMSNorm on queries and keys, "head" over each head as in Qwen3, "projection" over all as in Olmo 2;
    sliding_window: the number of tokens that a token sees, itself included, as in Mistral (2310.06825);
    attention_gate: the output times sigmoid(g_proj(x)), elementwise, as in Qwen3-Next (2505.06708).

    It has no eigenvalue range. `key_values.py` describes its state in the cache.
    """

    title, paper = "Softmax attention", "1706.03762"
    kind = "transformer"
    options = (
        "num_heads",
        "head_dim",
        "num_kv_heads",
        "rope_theta",
        "rope_scaling",
        "qk_norm",
        "sliding_window",
        "attention_gate",
    )

    @staticmethod
    def cost(config: LrnnConfig) -> Cost:
        inner, kv = config.num_heads * config.head_dim, key_heads(config) * config.head_dim
        T = config.max_position_embeddings
        window = min(T, T if config.sliding_window is None else config.sliding_window)
        # Pairs of a token and one that it sees, in a sequence; each takes a score and a sum.
        pairs = window * (window + 1) // 2 + (T - window) * window
        weights = config.hidden_size * ((2 + config.attention_gate) * inner + 2 * kv)
        recurrence = 2 * pairs * inner // T
        if config.sliding_window is None:
            return Cost(weights, recurrence, state=None, cache_per_token=2 * kv)
        return Cost(weights, recurrence, state=2 * kv * config.sliding_window)

    @classmethod
    def details(cls, config: LrnnConfig) -> dict[str, str]:
        facts = {
            "key and value heads": config.num_kv_heads,
            "base of rotary positions": "none" if config.rope_theta is None else f"{config.rope_theta:g}",
            "scaling of rotary positions": config.rope_theta and config.rope_scaling and _in_words(config.rope_scaling),
            "norm of queries and keys": config.qk_norm and f"over each {config.qk_norm}",
            "tokens that a token sees": config.sliding_window,
            "gate on the output": "sigmoid" if config.attention_gate else None,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}

    @classmethod
    def check(cls, config: LrnnConfig) -> None:
        for name in ("num_kv_heads", "sliding_window"):
            value = getattr(config, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer or null; got {value!r}")
        if config.num_heads % key_heads(config):
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {config.num_heads} and {config.num_kv_heads}"
            )
        if config.qk_norm is not None and config.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be null, 'head' or 'projection'; got {config.qk_norm!r}")
        if type(config.attention_gate) is not bool:
            raise ValueError(f"attention_gate must be true or false; got {config.attention_gate!r}")
        check_scaling(config.rope_scaling)
        theta = config.rope_theta
        if theta is None:
            return
        if type(theta) not in (int, float) or not 0 < theta < float("inf"):
            raise ValueError(f"rope_theta must be a positive number, or null for no positions; got {theta!r}")
        if config.head_dim % 2:
            raise ValueError(
                f"head_dim of attention must be even for rotary positions, or rope_theta null; got {config.head_dim}"
            )

    def __init__(self, config: LrnnConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden, (H, D), self.kv_heads = config.hidden_size, self.heads, key_heads(config)
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.window, self.qk_norm = config.sliding_window, config.qk_norm
        self.q_proj = nn.Linear(hidden, H * D, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * D, bias=False)
        if config.qk_norm is not None:
            widths = (D, D) if config.qk_norm == "head" else (H * D, self.kv_heads * D)
            self.q_norm, self.k_norm = (RMSNorm(width, config.norm_eps) for width in widths)
        self.g_proj = nn.Linear(hidden, H * D, bias=False) if config.attention_gate else None
        self.o_proj = nn.Linear(H * D, hidden, bias=False)

    def forward(self, x, cache, mask, cu_seqlens, document) -> Tensor:
        q, k, v = self._project(x)
        before = self.read_state(cache)
        if self.rope_theta is not None:
            position = positions(x, None if before is None else before[2], cu_seqlens, document)
            cos, sin = turns(position, self.heads[1], self.rope_theta, self.rope_scaling)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if before is None:  # padding is behind the tokens, so that none of them sees it
            o = attend(q, k, v, self.window, cu_seqlens)
            state = None if cache is None else first_state(k, v, mask, self.window, document)
        else:
            before = with_room(before, cache.seen_tokens + x.shape[1], self.window)
            o, state = attend_and_write(before, q, k, v, mask, self.window, document)
        self.write_state(cache, state)
        o = o.flatten(-2)
        return self.o_proj(o if self.g_proj is None else o * self.g_proj(x).sigmoid())

    def reserve(self, cache: LrnnCacheLayer, tokens: int) -> None:
        cache.state = with_slots(cache.state, tokens, self.window)

    def room(self, cache: LrnnCacheLayer) -> int | None:
        return slots_for(cache.state, self.window)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, T, H, D], keys and values [B, T, G, D], queries and keys normed if they are to be."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.heads[1])) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def key_heads(config: LrnnConfig) -> int:
    """Return the number of key and value heads."""
    return config.num_heads if config.num_kv_heads is None else config.num_kv_heads


def _in_words(scaling: dict[str, Any]) -> str:
    """Return the type and the other keys of `rope_scaling`, such as "yarn (factor 4)"."""
    return f"{scaling['rope_type']} ({', '.join(f'{key} {x}' for key, x in scaling.items() if key != 'rope_type')})"
