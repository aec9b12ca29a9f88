"""The configuration of flash-linear-attention's model that has the same parameters and computes the same function."""

import math
from typing import TYPE_CHECKING, Any

from lrnn.errors import UserError
from lrnn.model.mixers import MIXERS

if TYPE_CHECKING:
    from lrnn import LrnnConfig

ARCHITECTURES = {"gated_deltanet": "GatedDeltaNetForCausalLM", "delta_net": "DeltaNetForCausalLM"}
MIXER_OF = {mixer.fla_model_type: name for name, mixer in MIXERS.items() if mixer.fla_model_type is not None}
ATTENTION = "attention"

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
_COMMON = {"use_short_conv": True, "attnres_block_size": None, "hidden_act": "swish"}
FIXED: dict[str, dict[str, Any]] = {
    "gated_deltanet": {**_COMMON, "use_gate": True},
    "delta_net": {**_COMMON, "use_gate": False, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"},
}


def recurrent_layer(config: "LrnnConfig") -> "LrnnConfig":
    """Return the configuration of the layers of a model that are not attention, which are all the same.

    Raises:
        UserError: fla has no model of these layers, because of their mixer or because they differ.
    """
    layers = [layer for layer, _ in config.kinds_of_layers() if layer.mixer != ATTENTION]
    if len(layers) == 1 and layers[0].mixer in MIXER_OF.values():
        return layers[0]
    known, names = " and ".join(MIXER_OF.values()), ", ".join(layer.mixer for layer in layers) or ATTENTION
    if len(layers) > 1:
        raise UserError(f"the fla format has one recurrent mixer, the same in all layers; this model's are {names}")
    raise UserError(f"the fla format is for the mixers {known}; this model's is {names}: use --format hf")


def not_in_fla(config: "LrnnConfig") -> str | None:
    """Return the form of its blocks, or of its heads, that fla's model does not have, or None."""
    for layer, numbers in config.kinds_of_layers():
        for name, value, has in _attention_forms(layer) if layer.mixer == ATTENTION else _recurrent_forms(layer):
            if value is not None:
                return f"{name} {value!r}{f' of layer {numbers[0]}' if config.is_hybrid else ''}, where fla has {has}"
    return None


def to_fla_config(config: "LrnnConfig") -> dict[str, Any]:
    """Return the `config.json` of fla's model that computes the same function with the same parameters.

    Raises:
        UserError: this conversion does not know the mixer, or fla's model has no blocks or heads of this form.
    """
    layer = recurrent_layer(config)
    if (form := not_in_fla(config)) is not None:
        raise UserError(f"the fla format cannot express this model's {form}: use --format hf")
    kind = MIXERS[layer.mixer].fla_model_type
    fla = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **FIXED[kind]}
    fla |= {name: getattr(layer, name) for name in SHARED} | {"attn": _attention(config)}
    H, HV, K, V = heads = MIXERS[layer.mixer].head_sizes(layer)
    if kind == "gated_deltanet":
        fla |= {"head_dim": K, "expand_v": _expand(K, V)} | ({"num_v_heads": HV} if HV != H else {})
        return fla
    return fla | {"expand_k": heads.keys / layer.hidden_size, "expand_v": heads.values / layer.hidden_size}


def _recurrent_forms(layer: "LrnnConfig") -> list[tuple[str, Any, str]]:
    """Return what fla's layer does not have: name, value, or None if fla has it, and what fla has instead."""
    heads, norm_eps = layer.num_heads, layer.norm_eps
    other_heads = layer.num_value_heads not in (None, heads) and layer.mixer != MIXER_OF["gated_deltanet"]
    return [
        ("norm_position", None if layer.norm_position == "pre" else layer.norm_position, "'pre'"),
        ("gated_norm_eps", None if layer.gated_norm_eps == norm_eps else layer.gated_norm_eps, f"{norm_eps!r}"),
        ("num_value_heads", layer.num_value_heads if other_heads else None, f"num_heads, {heads}"),
    ]


def _attention_forms(layer: "LrnnConfig") -> list[tuple[str, Any, str]]:
    """Return the same for attention."""
    width = layer.hidden_size // layer.num_heads
    fits = layer.head_dim * layer.num_heads == layer.hidden_size
    return [
        ("norm_position", None if layer.norm_position == "pre" else layer.norm_position, "'pre'"),
        ("head_dim", None if fits else layer.head_dim, f"hidden_size / num_heads, {width}"),
        ("rope_theta", "null" if layer.rope_theta is None else None, "rotary positions"),
        ("qk_norm", layer.qk_norm, "none"),
        ("attention_gate", layer.attention_gate or None, "none"),
    ]


def _attention(config: "LrnnConfig") -> dict[str, Any] | list[dict[str, Any]] | None:
    """Return fla's settings of the layers with attention: one mapping if they are all the same."""
    specs = [
        {
            "layers": numbers,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_heads if layer.num_kv_heads is None else layer.num_kv_heads,
            "qkv_bias": False,
            "window_size": layer.sliding_window,
            "rope_theta": layer.rope_theta,
        }
        for layer, numbers in config.kinds_of_layers()
        if layer.mixer == ATTENTION
    ]
    return specs if len(specs) > 1 else specs[0] if specs else None


def _expand(K: int, V: int) -> float:
    """Return the factor by which fla makes V of K, by rounding their product down."""
    factor = V / K
    return factor if int(K * factor) == V else math.nextafter(factor, math.inf)
