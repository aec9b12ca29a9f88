"""Read model folders of flash-linear-attention (`fla`), and check those that are written for it.

Names and shapes of the parameters are the same as in lrnn. Only the configurations differ, see `lrnn.fla_config`.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.export.check import check_loading_info
from lrnn.fla_config import ARCHITECTURES, ATTENTION, FIXED, MIXER_OF, SHARED
from lrnn.model.configuration_lrnn import OPTIONS


def from_fla(folder: Path) -> tuple[LrnnConfig, dict[str, Tensor]]:
    """Read a model folder of fla.

    Returns:
        The configuration, and the parameters by name, in the dtypes of the file.

    Raises:
        UserError: the folder holds no `gated_deltanet` or `delta_net` model with safetensors, lrnn does not support a
            setting, or the parameters do not fit the configuration.
    """
    config = _read_config(folder)
    state = _read_weights(folder)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    with torch.device("meta"):
        expected = {name: p.shape for name, p in LrnnForCausalLM(config).named_parameters()}
    odd = sorted(set(expected) ^ set(state))
    if odd:
        raise UserError(f"{folder}: parameter {odd[0]} is {'missing' if odd[0] in expected else 'unknown to lrnn'}")
    for name, shape in expected.items():
        if state[name].shape != shape:
            got, wanted = list(state[name].shape), list(shape)
            raise UserError(f"{folder}: {name} has shape {got}, its config.json asks for {wanted}")
    return config, state


def check_fla_folder(folder: Path, model: torch.nn.Module) -> None:
    """Load a folder with fla, and compare names, shapes and values with `model`. (fla's forward pass needs a GPU.)

    Raises:
        RuntimeError: a parameter is missing or unknown, or has another shape or value.
    """
    import fla  # noqa: F401  registers its models
    from transformers import AutoModelForCausalLM

    with _attention_without_flash_attn():
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    check_loading_info(info, "fla")
    theirs = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        if not torch.equal(theirs.pop(name), parameter.float()):
            raise RuntimeError(f"the export is wrong: fla reads other values of {name}")
    if theirs:
        raise RuntimeError(f"the export is wrong: fla has a parameter {min(theirs)} that the trained model lacks")


@contextmanager
def _attention_without_flash_attn() -> Iterator[None]:
    """Let fla build attention where flash-attn, which only its forward pass calls, is not installed."""
    from fla.layers import attn

    installed = attn.flash_attn_func
    attn.flash_attn_func = installed or _attention_without_flash_attn
    try:
        yield
    finally:
        attn.flash_attn_func = installed


def _read_config(folder: Path) -> LrnnConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder of fla: it has no config.json")
    try:
        kind = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a model configuration: {error!r}") from None
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: model_type {kind!r} cannot be read; lrnn has {' and '.join(ARCHITECTURES)}")
    from fla.models import DeltaNetConfig, GatedDeltaNetConfig

    # fla's classes are needed, because a config.json leaves out values that are fla's defaults.
    fla = (GatedDeltaNetConfig if kind == "gated_deltanet" else DeltaNetConfig).from_pretrained(folder)
    for field, value in FIXED[kind].items():
        if getattr(fla, field) != value:
            raise UserError(f"{path}: {field} is {getattr(fla, field)!r}; lrnn supports only {value!r}")
    fields = {name: getattr(fla, name) for name in SHARED}
    if kind == "gated_deltanet" and fla.output_gate_activation not in ("swish", "silu"):
        raise UserError(f"{path}: output_gate_activation is {fla.output_gate_activation!r}; lrnn supports only 'swish'")
    fields |= _heads(fla, kind, path)
    if fla.intermediate_size is None:  # fla's rule: 2/3 hidden_ratio hidden_size, rounded up to a multiple of 256
        ratio = 4 if fla.hidden_ratio is None else fla.hidden_ratio
        fields["intermediate_size"] = 256 * -(-int(fla.hidden_size * ratio * 2 / 3) // 256)
    kept = getattr(fla, "lrnn_training", None)
    try:
        mixer = _pattern(fla, kind, fields, path)
        return LrnnConfig(mixer=mixer, **fields, **({} if kept is None else {"lrnn_training": kept}))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _pattern(fla: Any, kind: str, fields: dict[str, Any], path: Path) -> list[str | dict[str, Any]]:
    """Return the mixers of the layers, as short a pattern as there is. Raises UserError for attention with biases."""
    entries: list[str | dict[str, Any]] = [MIXER_OF[kind]] * fla.num_hidden_layers
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
    lengths = range(1, len(entries) + 1)
    shortest = next(n for n in lengths if all(entry == entries[i % n] for i, entry in enumerate(entries)))
    return entries[:shortest]


def _heads(fla: Any, kind: str, path: Path) -> dict[str, int]:
    """Return `head_dim` and, where they differ from those of keys, the number and size of value heads.

    Raises:
        UserError: a number or size of heads is not whole, or value heads are no multiple of key heads.
    """
    H = HV = fla.num_heads
    if kind == "gated_deltanet":
        HV = H if fla.num_v_heads is None else fla.num_v_heads
        K = fla.head_dim
        V = _whole(K * fla.expand_v, f"{path}: expand_v is {fla.expand_v}; head_dim times it")
    else:
        K, V = (
            _whole(fla.hidden_size * factor / H, f"{path}: {name} is {factor}; hidden_size / num_heads times it")
            for name, factor in (("expand_k", fla.expand_k), ("expand_v", fla.expand_v))
        )
    if HV % H:
        raise UserError(f"{path}: num_v_heads is {HV}; it must be a multiple of num_heads, {H}")
    return {"head_dim": K} | ({"head_v_dim": V} if V != K else {}) | ({"num_value_heads": HV} if HV != H else {})


def _whole(size: float, what: str) -> int:
    """Return a size that fla computes. Raises UserError, which begins with `what`, if it is not whole."""
    if not math.isclose(size, round(size), rel_tol=1e-5):
        raise UserError(f"{what} must be a whole number, not {size:g}")
    return round(size)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model.safetensors; weights in other formats are not read")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; {index.name} names it")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return state
