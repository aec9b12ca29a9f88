"""Compare blocks with the layers of Olmo Hybrid's class in transformers, forward and backward, in float32."""

import importlib

import pytest
import torch
from torch import nn

from lrnn import LrnnConfig
from lrnn.eval.model_class import import_class
from lrnn.model.modeling_lrnn import LrnnBlock

SIZES = {"hidden_size": 64, "intermediate_size": 96}
LINEAR = {"input_layernorm": "attn_norm", "linear_attn": "attn", "post_attention_layernorm": "mlp_norm"}
ATTENTION = {"self_attn": "attn", "post_attention_layernorm": "attn_norm", "post_feedforward_layernorm": "mlp_norm"}
JOINED = "linear_attn.conv1d.weight"  # the convolutions of q, k and v


@pytest.fixture(scope="module")
def olmo():
    """Return the module of the class, which computes with its own functions."""
    import_class("olmo_hybrid", "cpu")
    return importlib.import_module("transformers.models.olmo_hybrid.modeling_olmo_hybrid")


def config_of(olmo, **fields):
    """Return a configuration of the class with a linear layer and one of attention."""
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_attention_heads": 4}
    config = olmo.OlmoHybridConfig(**SIZES, **layers, **fields, vocab_size=64, pad_token_id=None)
    config._attn_implementation = "sdpa"
    return config


def copy_weights(theirs: nn.Module, ours: LrnnBlock, names: dict[str, str]) -> dict[str, str]:
    """Draw all weights of a layer of the class, and copy them. Return the names of those that both have."""
    renamed, state = {}, {}
    for name, parameter in theirs.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
        if name == JOINED:
            sizes = [ours.get_parameter(f"attn.{x}_conv1d.weight").shape[0] for x in "qkv"]
            parts = parameter.detach().split(sizes)
            state |= {f"attn.{x}_conv1d.weight": part for x, part in zip("qkv", parts, strict=True)}
        else:
            first, rest = name.split(".", 1)
            renamed[name] = f"{names.get(first, first)}.{rest}"
            state[renamed[name]] = parameter.detach()
    ours.load_state_dict(state)
    return renamed


def compare(theirs: nn.Module, ours: LrnnBlock, names: dict[str, str], **inputs):
    """Compare outputs and all gradients for the same weights, x and gradient of the output."""
    renamed = copy_weights(theirs, ours, names)
    x, dy = torch.randn(2, 2, 150, 64, generator=torch.Generator().manual_seed(1)).unbind()
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ys = [theirs(xs[0], **inputs), ours(xs[1], None, None, None, None)]
    for y in ys:
        y.backward(dy)
    pairs = {"output": ys, "gradient of x": [x.grad for x in xs]}
    pairs |= {n: [theirs.get_parameter(n).grad, ours.get_parameter(m).grad] for n, m in renamed.items()}
    if "attn.q_conv1d.weight" in dict(ours.named_parameters()):
        parts = [ours.get_parameter(f"attn.{x}_conv1d.weight").grad for x in "qkv"]
        pairs["convolutions"] = [theirs.get_parameter(JOINED).grad, torch.cat(parts)]
    for name, (truth, found) in pairs.items():
        assert (found - truth).norm() < 1e-5 * truth.norm(), name


@pytest.mark.parametrize("value_sizes", [{}, {"num_value_heads": 4, "head_v_dim": 24}])
@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_gated_deltanet(olmo, allow_neg_eigval, value_sizes):
    torch.manual_seed(0)
    fields = {"num_heads": 2, "head_dim": 16, **value_sizes, "allow_neg_eigval": allow_neg_eigval}
    sizes = {"key": (2, 16), "value": (value_sizes.get("num_value_heads", 2), value_sizes.get("head_v_dim", 16))}
    linear = {f"linear_num_{kind}_heads": heads for kind, (heads, _) in sizes.items()}
    linear |= {f"linear_{kind}_head_dim": size for kind, (_, size) in sizes.items()}
    config = config_of(olmo, **linear, linear_allow_neg_eigval=allow_neg_eigval)
    ours = LrnnBlock(LrnnConfig(**SIZES, **fields, gated_norm_eps=1e-5), 0)
    compare(olmo.OlmoHybridLinearAttentionDecoderLayer(config, 0), ours, LINEAR)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}


@pytest.mark.parametrize(("rope_theta", "groups", "scaling"), [(None, 4, None), (500.0, 2, None), (500.0, 2, YARN)])
def test_attention(olmo, rope_theta, groups, scaling):
    torch.manual_seed(0)
    positions = {"rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": rope_theta}}
    config = config_of(olmo, num_key_value_heads=groups, **positions)
    fields = {"mixer": "attention", "num_heads": 4, "head_dim": 16, "num_kv_heads": groups, "rope_theta": rope_theta}
    fields |= {"rope_scaling": scaling}
    ours = LrnnBlock(LrnnConfig(**SIZES, **fields, qk_norm="projection", norm_position="post"), 1)
    angles = None
    if rope_theta is not None:
        angles = olmo.OlmoHybridRotaryEmbedding(config)(torch.zeros(()), torch.arange(150)[None])
    theirs = olmo.OlmoHybridAttentionDecoderLayer(config, 1)
    compare(theirs, ours, ATTENTION, position_embeddings=angles)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_fields_of_plain_models_stay_as_they_were(norm_position, tmp_path):
    config = LrnnConfig(**SIZES, norm_position=norm_position, gated_norm_eps=1e-5)
    config.save_pretrained(tmp_path)
    again = LrnnConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.norm_position == norm_position
    assert ("norm_position" in config.to_dict()) == (norm_position == "post")
    assert "gated_norm_eps" not in LrnnConfig().to_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_position", "both", "norm_position 'both' is not one of pre, post"),
        ("gated_norm_eps", "1e-5", "gated_norm_eps must be a number that is not negative, or null; got '1e-5'"),
    ],
)
def test_bad_forms(field, value, message):
    with pytest.raises(ValueError, match=message):
        LrnnConfig(**{field: value})
