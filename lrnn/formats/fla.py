"""Models of flash-linear-attention (`fla`) that have lrnn's parameters and compute the same function, both ways.

Names and shapes of the parameters are the same. Only the configurations differ.
"""

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrnn.errors import UserError
from lrnn.model.mixers import MIXERS

if TYPE_CHECKING:
    from lrnn import LrnnConfig

ARCHITECTURES = {  # by `model_type`; the configuration class has the same name with Config in place of ForCausalLM
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
}
TYPE_OF = {name: mixer.fla_model_type for name, mixer in MIXERS.items() if mixer.fla_model_type is not None}
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

# These settings of fla change the computed function; each has the only value that the mixer supports.
_COMMON = {"use_short_conv": True, "attnres_block_size": None, "hidden_act": "swish"}
FIXED: dict[str, dict[str, Any]] = {
    "gated_deltanet": {**_COMMON, "use_gate": True},
    "deltanet": {**_COMMON, "use_gate": False, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"},
    "gated_deltaproduct": {**_COMMON, "use_forget_gate": True, "use_output_gate": True},
    "deltaproduct": {**_COMMON, "use_forget_gate": False, "use_output_gate": False},
}


def recurrent_layer(config: "LrnnConfig") -> "LrnnConfig":
    """Return the configuration of the layers of a model that are not attention, which are all the same.

    Raises:
        UserError: fla has no model of these layers, because of their mixer or because they differ.
    """
    layers = [layer for layer, _ in config.kinds_of_layers() if layer.mixer != ATTENTION]
    if len(layers) == 1 and layers[0].mixer in TYPE_OF:
        return layers[0]
    known, names = ", ".join(TYPE_OF), ", ".join(layer.mixer for layer in layers) or ATTENTION
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
    kind = TYPE_OF[layer.mixer]
    fla = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **FIXED[layer.mixer]}
    fla |= {name: getattr(layer, name) for name in SHARED} | {"attn": _attention(config)}
    H, HV, K, V = heads = MIXERS[layer.mixer].head_sizes(layer)
    if kind == "delta_net":
        return fla | {"expand_k": heads.keys / layer.hidden_size, "expand_v": heads.values / layer.hidden_size}
    fla |= {"head_dim": K, "expand_v": _expand(K, V)} | ({"num_v_heads": HV} if HV != H else {})
    return fla | ({"num_householder": layer.num_householder} if kind == "gated_deltaproduct" else {})


def _recurrent_forms(layer: "LrnnConfig") -> list[tuple[str, Any, str]]:
    """Return what fla's layer does not have: name, value, or None if fla has it, and what fla has instead."""
    heads, norm_eps = layer.num_heads, layer.norm_eps
    other_heads = layer.num_value_heads not in (None, heads) and layer.mixer != "gated_deltanet"
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
        ("rope_scaling", None if layer.rope_theta is None else layer.rope_scaling, "none"),
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


def from_fla_config(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of lrnn's model that has the parameters of a folder of fla and computes the same function.

    Args:
        folder: the folder, whose `config.json` fla reads: it leaves out values that are fla's defaults.
        raw: content of that file.

    Raises:
        UserError: lrnn has no model with these settings. The message names the setting and its value.
    """
    kind, path = raw["model_type"], folder / "config.json"
    config_class = getattr(importlib.import_module("fla.models"), ARCHITECTURES[kind].replace("ForCausalLM", "Config"))
    try:
        fla = config_class.from_pretrained(folder)
    except Exception as error:  # of any kind: fla checks little, and transformers has classes of its own
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    _check_sizes(fla, kind, path)
    mixer = _mixer_of(fla, kind, path)
    for field, value in FIXED[mixer].items():
        if getattr(fla, field) != value:
            raise UserError(f"{path}: {field} is {getattr(fla, field)!r}; lrnn supports only {value!r}")
    if kind == "gated_deltanet" and fla.output_gate_activation not in ("swish", "silu"):
        raise UserError(f"{path}: output_gate_activation is {fla.output_gate_activation!r}; lrnn supports only 'swish'")
    fields = {name: getattr(fla, name) for name in SHARED} | _heads(fla, kind, path)
    if kind == "gated_deltaproduct":
        fields["num_householder"] = fla.num_householder
    if fla.intermediate_size is None:  # fla's rule: 2/3 hidden_ratio hidden_size, rounded up to a multiple of 256
        ratio = 4 if fla.hidden_ratio is None else fla.hidden_ratio
        fields["intermediate_size"] = 256 * -(-int(fla.hidden_size * ratio * 2 / 3) // 256)
    return fields | {"mixer": _pattern(fla, mixer, fields, path)}


def _check_sizes(fla: Any, kind: str, path: Path) -> None:
    """Raise UserError if a size from which others are computed is not a positive number. fla checks few of them."""
    whole = ["hidden_size", "num_heads", "num_hidden_layers", *(["head_dim"] if kind != "delta_net" else [])]
    for field in (*whole, *(["expand_k"] if kind == "delta_net" else []), "expand_v"):
        value = getattr(fla, field)
        kinds = int if field in whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            what = "whole number" if field in whole else "number"
            raise UserError(f"{path}: {field} is {value!r}; it should be a positive {what}")


def _mixer_of(fla: Any, kind: str, path: Path) -> str:
    """Return the mixer of the recurrent layers. Raise UserError if only one of DeltaProduct's gates is on."""
    (first, *others) = (name for name, model_type in TYPE_OF.items() if model_type == kind)
    if not others:
        return first
    forgets, gates = fla.use_forget_gate, fla.use_output_gate
    if forgets != gates:
        raise UserError(
            f"{path}: use_forget_gate is {forgets!r} and use_output_gate is {gates!r}; lrnn has both gates or neither"
        )
    return next(name for name in (first, *others) if FIXED[name]["use_forget_gate"] == bool(forgets))


def _pattern(fla: Any, mixer: str, fields: dict[str, Any], path: Path) -> str | list[str | dict[str, Any]]:
    """Return the mixers of the layers, as short a pattern as there is. Raises UserError for attention with biases."""
    from lrnn.model.configuration_lrnn import OPTIONS  # here, because it imports transformers

    entries: list[str | dict[str, Any]] = [mixer] * fla.num_hidden_layers
    for spec in [fla.attn] if isinstance(fla.attn, dict) else fla.attn or []:
        H, G = spec["num_heads"], spec["num_kv_heads"]
        if spec["qkv_bias"]:
            raise UserError(f"{path}: attn.qkv_bias is True; lrnn supports only False")
        if fla.hidden_size % H:
            raise UserError(f"{path}: attn.num_heads is {H}; it must divide hidden_size, {fla.hidden_size}")
        options = {"num_heads": H, "head_dim": fla.hidden_size // H, "num_kv_heads": G if G != H else None}
        options |= {"sliding_window": spec["window_size"], "rope_theta": spec["rope_theta"]}
        given = {name: x for name, x in options.items() if x != fields.get(name, OPTIONS.get(name))}
        for number in spec["layers"]:
            entries[number] = {"mixer": ATTENTION, **given}
    return shortest_pattern(entries)


def shortest_pattern(entries: list[str | dict[str, Any]]) -> str | list[str | dict[str, Any]]:
    """Return the entries of all layers as the shortest pattern that repeats to them, or as one name."""
    lengths = range(1, len(entries) + 1)
    shortest = next(n for n in lengths if all(entry == entries[i % n] for i, entry in enumerate(entries)))
    return entries[0] if shortest == 1 and isinstance(entries[0], str) else entries[:shortest]


def _heads(fla: Any, kind: str, path: Path) -> dict[str, int]:
    """Return `head_dim` and, where they differ from those of keys, the number and size of value heads.

    Raises:
        UserError: a number or size of heads is not whole, or value heads are no multiple of key heads.
    """
    H = HV = fla.num_heads
    if kind == "delta_net":
        K, V = (
            _whole(fla.hidden_size * factor / H, f"{path}: {name} is {factor}; hidden_size / num_heads times it")
            for name, factor in (("expand_k", fla.expand_k), ("expand_v", fla.expand_v))
        )
    else:
        # fla's model of DeltaProduct has as many value heads as key heads, whatever its configuration says.
        HV = H if kind == "gated_deltaproduct" or fla.num_v_heads is None else fla.num_v_heads
        K = fla.head_dim
        V = _whole(K * fla.expand_v, f"{path}: expand_v is {fla.expand_v}; head_dim times it")
    if HV % H:
        raise UserError(f"{path}: num_v_heads is {HV}; it must be a multiple of num_heads, {H}")
    return {"head_dim": K} | ({"head_v_dim": V} if V != K else {}) | ({"num_value_heads": HV} if HV != H else {})


def _whole(size: float, what: str) -> int:
    """Return a size that fla computes. Raises UserError, which begins with `what`, if it is not whole."""
    if not math.isclose(size, round(size), rel_tol=1e-5):
        raise UserError(f"{what} must be a whole number, not {size:g}")
    return round(size)
