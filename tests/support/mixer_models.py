"""Small models of every token mixer for tests, in which every parameter affects the results."""

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.mixers import MIXERS
from lrnn.model.registry import canonical_name

SIZE = {"vocab_size": 97, "hidden_size": 32, "num_heads": 2, "head_dim": 16, "intermediate_size": 48, "state_size": 5}
PRODUCTS = [name for name, mixer in MIXERS.items() if getattr(mixer, "several_factors", False)]
VARIANTS = {f"{mixer}{n}": {"mixer": mixer, "num_householder": n} for mixer in PRODUCTS for n in (1, 2, 3, 4)}
VARIANTS |= {mixer: {"mixer": mixer} for mixer in MIXERS if mixer not in PRODUCTS}
# Two value heads per key head, and keys and values of different sizes.
SIZES_OF_THEIR_OWN = {"num_value_heads": 4, "head_dim": 12, "head_v_dim": 24}
VARIANTS["gated_deltanet_sizes"] = {"mixer": "gated_deltanet", **SIZES_OF_THEIR_OWN}
MORE_SIZES = {
    "deltanet_sizes": {"mixer": "deltanet", "num_value_heads": 6, "head_v_dim": 5},
    "gated_deltaproduct2_sizes": {"mixer": "gated_deltaproduct", "num_householder": 2, **SIZES_OF_THEIR_OWN},
}
VARIANTS["transformer"] = {"mixer": "transformer"}  # its older name, with the options at their defaults
VARIANTS["attention"] |= {"num_kv_heads": 1, "qk_norm": "head", "sliding_window": 9, "attention_gate": True}
WITHOUT_RANGE = [
    variant for variant, fields in VARIANTS.items() if MIXERS[canonical_name(fields["mixer"])].ranges is None
]

# What depends on the sizes of heads is tested in one range (`every_case`), the rest without them.
every_variant = pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "gated_deltanet_sizes"])
every_case = pytest.mark.parametrize(
    "variant, allow_neg_eigval",
    [(v, r) for v in VARIANTS for r in (True, False) if r or v not in (*WITHOUT_RANGE, "gated_deltanet_sizes")],
)


def make_model(variant: str, allow_neg_eigval: bool = True, **config) -> LrnnForCausalLM:
    """Return a model in which every parameter matters, and decays and steps cover their whole range."""
    torch.manual_seed(0)
    fields = SIZE | (VARIANTS | MORE_SIZES)[variant] | {"allow_neg_eigval": allow_neg_eigval, "num_hidden_layers": 1}
    fields |= config
    model = LrnnForCausalLM(LrnnConfig(**fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.ndim == 2 and not name.endswith(("A_log", "gate_bias")):
                p.normal_(std=0.2)
            elif name.endswith((".D", ".r_k", ".k_k", ".k_a", ".bias")):
                p.add_(0.3 * torch.randn_like(p))
            elif name.endswith(("A_log", "dt_bias", "gate_bias")):
                p.copy_(0.5 * torch.randn_like(p))
            if "gk_proj.1" in name:  # GLA's decay is below 0.5 if the logit is below -11
                p.mul_(12).sub_(8 if p.ndim == 1 else 0)
            if "a_proj.1.weight" in name:
                p.mul_(4)  # RWKV-7's in-context rates, near 0 and 1
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()
