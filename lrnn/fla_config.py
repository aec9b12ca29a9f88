"""The configuration of flash-linear-attention's model that has the same parameters and computes the same function."""

import math
from typing import TYPE_CHECKING, Any

from lrnn.errors import UserError
from lrnn.model.mixers import MIXERS

if TYPE_CHECKING:
    from lrnn import LrnnConfig

ARCHITECTURES = {"gated_deltanet": "GatedDeltaNetForCausalLM", "delta_net": "DeltaNetForCausalLM"}
MIXER_OF = {mixer.fla_model_type: name for name, mixer in MIXERS.items() if mixer.fla_model_type is not None}

SHARED = (  # fields with the same meaning in both
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "allow_neg_eigval",
    "conv_size",
    "intermediate_size",
    "norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)

# These settings of fla change the computed function; each has the only value that lrnn supports.
_COMMON = {"use_short_conv": True, "attn": None, "attnres_block_size": None, "hidden_act": "swish"}
FIXED: dict[str, dict[str, Any]] = {
    "gated_deltanet": {**_COMMON, "use_gate": True},
    "delta_net": {**_COMMON, "use_gate": False, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"},
}


def not_in_fla(config: "LrnnConfig") -> str | None:
    """Return the form of its blocks, or of its heads, that fla's model does not have, or None."""
    for name, only in {"norm_position": "pre", "gated_norm_eps": config.norm_eps}.items():
        if getattr(config, name) not in (None, only):
            return f"{name} {getattr(config, name)!r}, where fla has {only!r}"
    if config.num_value_heads not in (None, config.num_heads) and config.mixer != MIXER_OF["gated_deltanet"]:
        return f"num_value_heads {config.num_value_heads}, where fla has num_heads, {config.num_heads}"
    return None


def to_fla_config(config: "LrnnConfig") -> dict[str, Any]:
    """Return the `config.json` of fla's model that computes the same function with the same parameters.

    Raises:
        UserError: this conversion does not know the mixer, or fla's model has no blocks or heads of this form.
    """
    if config.mixer not in MIXER_OF.values():
        known = " and ".join(MIXER_OF.values())
        raise UserError(f"the fla format is for the mixers {known}; this model's is {config.mixer}: use --format hf")
    if (form := not_in_fla(config)) is not None:
        raise UserError(f"the fla format cannot express this model's {form}: use --format hf")
    kind = MIXERS[config.mixer].fla_model_type
    fla = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **FIXED[kind]}
    fla |= {name: getattr(config, name) for name in SHARED}
    H, HV, K, V = heads = MIXERS[config.mixer].head_sizes(config)
    if kind == "gated_deltanet":
        fla |= {"head_dim": K, "expand_v": _expand(K, V)} | ({"num_v_heads": HV} if HV != H else {})
        return fla
    return fla | {"expand_k": heads.keys / config.hidden_size, "expand_v": heads.values / config.hidden_size}


def _expand(K: int, V: int) -> float:
    """Return the factor by which fla makes V of K, by rounding their product down."""
    factor = V / K
    return factor if int(K * factor) == V else math.nextafter(factor, math.inf)
