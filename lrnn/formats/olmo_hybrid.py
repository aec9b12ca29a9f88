"""Models of transformers' class `olmo_hybrid`, both ways: their `config.json`, and their parameters on disk.

The class, which vLLM has too, is gated DeltaNet in pre-norm blocks and attention in post-norm blocks. What it cannot
express is refused. Weights are written under the names that both read, never by `save_pretrained` of the class, whose
names vLLM does not know. All names that transformers reads are read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.formats.fla import shortest_pattern
from lrnn.model.configuration_lrnn import OPTIONS
from lrnn.model.rope_scaling import check_scaling
from lrnn.model_config import SAME_AS

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
    FULL: {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rope_theta": "rope_theta",
        "rope_scaling": "rope_scaling",
    },
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
# Names of modules of a layer, where they differ from lrnn's.
RENAMED = {
    LINEAR: {"attn_norm": "input_layernorm", "attn": "linear_attn", "mlp_norm": "post_attention_layernorm"},
    FULL: {"attn_norm": "post_attention_layernorm", "attn": "self_attn", "mlp_norm": "post_feedforward_layernorm"},
}
# Names that `save_pretrained` of the class writes instead of these.
ALSO_READ = {"input_layernorm": "attention_layer_norm", "post_attention_layernorm": "feedforward_layer_norm"}
CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
JOINED = "conv1d"  # the three in one, as the class has them in memory


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
    rope_theta, rope_scaling = (shared[FULL].pop(name) for name in ("rope_theta", "rope_scaling"))
    rope = rope_scaling if rope_theta is not None and rope_scaling is not None else {"rope_type": "default"}
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
        "rope_parameters": {**rope, "rope_theta": None if rope_theta is None else float(rope_theta)},
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
        names[name] = _name_on_disk(name, content["layer_types"])
        found[names[name]] = list(parameter.shape)
    expected = olmo_shapes(content)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        got, wanted = found.get(wrong[0], "missing"), expected.get(wrong[0], "no such parameter")
        raise RuntimeError(f"the export is wrong: {wrong[0]} is {got}; olmo_hybrid has {wanted}")
    return names


def _name_on_disk(name: str, layer_types: Sequence[str]) -> str:
    """Return the name on disk of a parameter of lrnn's model."""
    if not name.startswith("model.layers."):
        return name.replace("model.embeddings.", "model.embed_tokens.")
    *layer, number, module, rest = name.split(".", 4)
    return ".".join((*layer, number, RENAMED[layer_types[int(number)]].get(module, module), rest))


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
    return getattr(layer, SAME_AS[field]) if value is None and field in SAME_AS else value


def _refuse(what: str, instead: str) -> NoReturn:
    raise UserError(f"the olmo_hybrid format cannot express {what}: {instead}; use --format hf")


def from_olmo_config(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of lrnn's model that has the parameters of a folder of the class, and computes the same.

    Args:
        folder: the folder, for messages.
        raw: content of its `config.json`. The class fills in what it leaves out.

    Raises:
        UserError: lrnn has no model with these settings. The message names the setting and its value.
    """
    from transformers import OlmoHybridConfig

    path = folder / "config.json"
    try:
        content = OlmoHybridConfig.from_dict(raw)
    except Exception as error:  # transformers has classes of its own
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    for field in ("hidden_act", "attention_bias", "attention_dropout"):
        if getattr(content, field) != FIXED[field]:
            raise UserError(f"{path}: {field} is {getattr(content, field)!r}; lrnn supports only {FIXED[field]!r}")
    if raw.get("linear_use_gate", True) is not True:
        raise UserError(f"{path}: linear_use_gate is {raw['linear_use_gate']!r}; lrnn supports only True")
    if isinstance(content.eos_token_id, list):
        raise UserError(f"{path}: eos_token_id is {content.eos_token_id!r}; lrnn supports only one id")
    fields = {name: getattr(content, name) for name in SAME} | {"norm_eps": content.rms_norm_eps}
    linear = {ours: getattr(content, theirs) for theirs, ours in SHARED[LINEAR].items()}
    fields |= {name: x for name, x in linear.items() if name not in SAME_AS or x != linear[SAME_AS[name]]}
    fields["gated_norm_eps"] = ONLY[LINEAR]["gated_norm_eps"]
    entries: dict[str, str | dict[str, Any]] = {LINEAR: "gated_deltanet", FULL: _attention_entry(content, fields, path)}
    unknown = sorted(set(content.layer_types) - entries.keys())
    if unknown or len(content.layer_types) != content.num_hidden_layers:
        what = f"names {unknown[0]!r}" if unknown else f"has {len(content.layer_types)} entries"
        known = f"{content.num_hidden_layers} of {LINEAR} and {FULL}"
        raise UserError(f"{path}: layer_types {what}; it should have one for each layer, {known}")
    return fields | {"mixer": shortest_pattern([entries[kind] for kind in content.layer_types])}


def _attention_entry(content: Any, fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the entry of a pattern for the layers with attention: what differs from `fields`."""
    hidden, H, G = content.hidden_size, content.num_attention_heads, content.num_key_value_heads
    width = getattr(content, "head_dim", None) or hidden // H
    if width * H != hidden:
        raise UserError(
            f"{path}: num_attention_heads is {H}, and each head has {width} numbers; lrnn supports only heads whose "
            f"sizes add up to hidden_size, {hidden}"
        )
    only = {name: value for name, value in ONLY[FULL].items() if name in ("norm_position", "qk_norm")}
    options = {"num_heads": H, "head_dim": width, "num_kv_heads": None if G == H else G}
    options |= _positions(content, path) | only
    return {"mixer": "attention"} | {x: y for x, y in options.items() if y != fields.get(x, OPTIONS.get(x))}


def _positions(content: Any, path: Path) -> dict[str, Any]:
    """Return the options of rotary positions."""
    rope = dict(content.rope_parameters or {})
    rope_theta = rope.pop("rope_theta", None)
    rope_scaling = None if rope_theta is None or rope.get("rope_type", "default") == "default" else rope
    try:
        check_scaling(rope_scaling)
    except ValueError as error:
        raise UserError(f"{path}: rope_parameters: {error}") from None
    return {"rope_theta": rope_theta, "rope_scaling": rope_scaling}


def olmo_sources(
    shapes: Mapping[str, Sequence[int]], layer_types: Sequence[str], present: Mapping[str, Sequence[int]]
) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return where the parameters of lrnn's model are in a folder of the class.

    Args:
        shapes: shape of each parameter of lrnn's model.
        layer_types: kinds of the layers, as `config.json` has them.
        present: shape of each tensor of the folder.

    Returns:
        The names of the tensors that hold a parameter, one after the other, and its first row in them. Only a
        convolution has several: the class joins them, and may save them in parts of another size.
    """
    sources: dict[str, tuple[tuple[str, ...], int]] = {}
    for name in shapes:
        on_disk = _name_on_disk(name, layer_types)
        *above, module, last = on_disk.split(".")
        if module in CONVOLUTIONS:
            parts = tuple(".".join((*above, part, last)) for part in CONVOLUTIONS)
            joined = ".".join((*above, JOINED, last))
            before = CONVOLUTIONS[: CONVOLUTIONS.index(module)]
            first = sum(shapes[name.replace(module, part)][0] for part in before)
            sources[name] = ((joined,) if joined in present else parts), first
        else:
            other = ".".join((*above, ALSO_READ.get(module, module), last))
            sources[name] = (other if on_disk not in present and other in present else on_disk,), 0
    return sources
