"""Describe a model as one of transformers' class `olmo_hybrid`: its `config.json`, and its parameters on disk.

The class, which vLLM has too, is gated DeltaNet in pre-norm blocks and attention in post-norm blocks. What it cannot
express is refused. Weights are written under the names that both read, never by `save_pretrained` of the class, whose
names vLLM does not know.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from lrnn import LrnnConfig
from lrnn.errors import UserError

LINEAR, FULL = "linear_attention", "full_attention"
KINDS = {"gated_deltanet": LINEAR, "attention": FULL}
# Fields that the class does not have, with the only value that it computes.
ONLY: dict[str, dict[str, Any]] = {
    LINEAR: {"norm_position": "pre", "gated_norm_eps": 1e-5},
    FULL: {"norm_position": "post", "qk_norm": "projection", "sliding_window": None, "attention_gate": False},
}
# Fields that the class has once for all layers of a kind, by its names.
SHARED = {
    LINEAR: {
        "linear_num_key_heads": "num_heads",
        "linear_num_value_heads": "num_value_heads",
        "linear_key_head_dim": "head_dim",
        "linear_value_head_dim": "head_v_dim",
        "linear_conv_kernel_dim": "conv_size",
        "linear_allow_neg_eigval": "allow_neg_eigval",
    },
    FULL: {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "rope_theta": "rope_theta"},
}
SAME = (  # fields with the same meaning and name in both
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings", "initializer_range", "use_cache"),
)
# Keys that lrnn has no field for. Those of A and dt are read only where a training of the class begins, as in lrnn.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "linear_a_log_min": 0.0,
    "linear_a_log_max": 16.0,
    "linear_dt_min": 0.001,
    "linear_dt_max": 0.1,
    "linear_dt_init_floor": 1e-4,
}
# Fields whose None means the value of another.
DEFAULTS = {
    "num_value_heads": "num_heads",
    "head_v_dim": "head_dim",
    "num_kv_heads": "num_heads",
    "gated_norm_eps": "norm_eps",
}
# Names of modules of a layer, where they differ from lrnn's.
RENAMED = {
    LINEAR: {"attn_norm": "input_layernorm", "attn": "linear_attn", "mlp_norm": "post_attention_layernorm"},
    FULL: {"attn_norm": "post_attention_layernorm", "attn": "self_attn", "mlp_norm": "post_feedforward_layernorm"},
}


def to_olmo_config(config: LrnnConfig, pad_token_id: int | None = None) -> dict[str, Any]:
    """Return the `config.json` of the class that computes the same function: every key that the class has.

    Args:
        config: of the model.
        pad_token_id: id of the tokenizer. One that is a token of texts is left out, since the class would not train
            its embedding.

    Raises:
        UserError: the class cannot express the model. The message names the field.
    """
    layers = [config.layer(i) for i in range(config.num_hidden_layers)]
    types = [_kind_of(layer, i) for i, layer in enumerate(layers)]
    if len(set(types)) == 1:
        _refuse(f"mixer = {layers[0].mixer!r} in all layers", "it has both gated_deltanet and attention")
    for i, (layer, kind) in enumerate(zip(layers, types, strict=True)):
        _check_layer(layer, kind, i, config)
    shared = {kind: _shared(layers, types, kind) for kind in (LINEAR, FULL)}
    rope_theta = shared[FULL].pop("rope_theta")
    of_texts = (config.bos_token_id, config.eos_token_id)
    return {
        "model_type": "olmo_hybrid",
        "architectures": ["OlmoHybridForCausalLM"],
        **{name: getattr(config, name) for name in SAME},
        "pad_token_id": None if pad_token_id in of_texts else pad_token_id,
        "rms_norm_eps": float(config.norm_eps),
        "layer_types": types,
        **shared[FULL],
        # A null in the place of the mapping would mean theta 10000; this one means no positions.
        "rope_parameters": {"rope_type": "default", "rope_theta": None if rope_theta is None else float(rope_theta)},
        **shared[LINEAR],
        **FIXED,
    }


def olmo_names(model: nn.Module, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the name on disk of each parameter of a model.

    Args:
        model: of lrnn.
        content: its `to_olmo_config`.

    Raises:
        RuntimeError: these are not the names and shapes of `olmo_shapes`, all of them and no other. transformers reads
            other names too, and vLLM may run with random weights in the place of a missing one.
    """
    names, found = {}, {}
    for name, parameter in model.named_parameters():
        names[name] = name.replace("model.embeddings.", "model.embed_tokens.")
        if name.startswith("model.layers."):
            *layer, number, module, rest = name.split(".", 4)
            module = RENAMED[content["layer_types"][int(number)]].get(module, module)
            names[name] = ".".join((*layer, number, module, rest))
        found[names[name]] = list(parameter.shape)
    expected = olmo_shapes(content)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        got, wanted = found.get(wrong[0], "missing"), expected.get(wrong[0], "no such parameter")
        raise RuntimeError(f"the export is wrong: {wrong[0]} is {got}; olmo_hybrid has {wanted}")
    return names


def olmo_shapes(content: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return names and shapes of all parameters on disk of a `config.json`, as transformers and vLLM read them."""
    hidden, vocab = content["hidden_size"], content["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    if not content["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [vocab, hidden]
    of_kind = {LINEAR: _linear_shapes(content), FULL: _attention_shapes(content)}
    for i, kind in enumerate(content["layer_types"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_kind[kind].items()}
    return shapes


def _linear_shapes(content: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, taps = content["hidden_size"], content["linear_conv_kernel_dim"]
    HV, V = content["linear_num_value_heads"], content["linear_value_head_dim"]
    keys, values = content["linear_num_key_heads"] * content["linear_key_head_dim"], HV * V
    shapes = {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
    for x, rows in {"q": keys, "k": keys, "v": values}.items():
        shapes |= {f"linear_attn.{x}_proj.weight": [rows, hidden], f"linear_attn.{x}_conv1d.weight": [rows, 1, taps]}
    shapes |= {f"linear_attn.{x}_proj.weight": [rows, hidden] for x, rows in {"a": HV, "b": HV, "g": values}.items()}
    shapes |= {"linear_attn.A_log": [HV], "linear_attn.dt_bias": [HV], "linear_attn.o_norm.weight": [V]}
    return shapes | {"linear_attn.o_proj.weight": [hidden, values]} | _mlp_shapes(content)


def _attention_shapes(content: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, heads = content["hidden_size"], content["num_attention_heads"]
    keys = content["num_key_value_heads"] * (hidden // heads)
    shapes = {"post_attention_layernorm.weight": [hidden], "post_feedforward_layernorm.weight": [hidden]}
    shapes |= {f"self_attn.{x}_proj.weight": [rows, hidden] for x, rows in {"q": hidden, "k": keys, "v": keys}.items()}
    shapes |= {"self_attn.q_norm.weight": [hidden], "self_attn.k_norm.weight": [keys]}
    return shapes | {"self_attn.o_proj.weight": [hidden, hidden]} | _mlp_shapes(content)


def _mlp_shapes(content: Mapping[str, Any]) -> dict[str, list[int]]:
    hidden, inner = content["hidden_size"], content["intermediate_size"]
    shapes = {f"mlp.{x}_proj.weight": [inner, hidden] for x in ("gate", "up")}
    return shapes | {"mlp.down_proj.weight": [hidden, inner]}


def _kind_of(layer: LrnnConfig, i: int) -> str:
    if layer.mixer not in KINDS:
        _refuse(f"mixer = {layer.mixer!r} in layer {i}", "its layers are gated_deltanet and attention")
    return KINDS[layer.mixer]


def _check_layer(layer: LrnnConfig, kind: str, i: int, config: LrnnConfig) -> None:
    """Raise UserError for a field of one layer that the class does not have."""
    for field, only in {**ONLY[kind], "norm_eps": config.norm_eps}.items():
        if _value(layer, field) != only:
            _refuse(f"{field} = {_value(layer, field)!r} in layer {i}, {layer.mixer}", f"it has {only!r} there")
    if kind == FULL and layer.num_heads * layer.head_dim != layer.hidden_size:
        sizes = f"num_heads = {layer.num_heads} and head_dim = {layer.head_dim} in layer {i}, {layer.mixer}"
        _refuse(sizes, f"their product is hidden_size, {layer.hidden_size}, there")


def _shared(layers: Sequence[LrnnConfig], types: Sequence[str], kind: str) -> dict[str, Any]:
    """Return the fields that the class has once for all layers of a kind. Raise UserError if they differ."""
    (first, *others) = (i for i, found in enumerate(types) if found == kind)
    for i in others:
        for field in SHARED[kind].values():
            values = [_value(layers[j], field) for j in (first, i)]
            if values[0] != values[1]:
                differing = f"{field} = {values[0]!r} in layer {first} and {values[1]!r} in layer {i}"
                _refuse(differing, f"it has one for all layers of {layers[i].mixer}")
    return {theirs: _value(layers[first], ours) for theirs, ours in SHARED[kind].items()}


def _value(layer: LrnnConfig, field: str) -> Any:
    value = getattr(layer, field)
    return getattr(layer, DEFAULTS[field]) if value is None and field in DEFAULTS else value


def _refuse(what: str, instead: str) -> NoReturn:
    raise UserError(f"the olmo_hybrid format cannot express {what}: {instead}; use --format hf")
