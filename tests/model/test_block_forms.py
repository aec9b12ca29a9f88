"""Compare the forms of blocks with those of Olmo Hybrid's class in transformers, forward and backward, in float32."""

import pytest
import torch
from torch import nn
from transformers import OlmoHybridConfig
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo

from lrnn import LrnnConfig
from lrnn.model.modeling_lrnn import LrnnBlock

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LINEAR = {"input_layernorm": "attn_norm", "linear_attn": "attn", "post_attention_layernorm": "mlp_norm"}
ATTENTION = {"self_attn": "attn", "post_attention_layernorm": "attn_norm", "post_feedforward_layernorm": "mlp_norm"}
FUNCTIONS = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
]


@pytest.fixture(autouse=True)
def in_pytorch(monkeypatch):
    """Let the class compute with its own functions, where it would call the kernels of an installed fla."""
    torch.set_num_threads(1)
    for name in FUNCTIONS:
        monkeypatch.setattr(olmo, name, getattr(olmo, name).__wrapped__)


def olmo_config(allow_neg_eigval: bool) -> OlmoHybridConfig:
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_allow_neg_eigval": allow_neg_eigval}
    layers = {"layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4}
    config = OlmoHybridConfig(**SIZES, **linear, **layers, vocab_size=64, pad_token_id=0)
    config._attn_implementation = "sdpa"
    return config


def copy_weights(theirs: nn.Module, ours: LrnnBlock, names: dict[str, str]) -> dict[str, str]:
    """Draw all weights of a layer of the class, and copy them. Return our names of its parameters, but convolutions."""
    renamed = {}
    for name, _ in theirs.named_parameters():
        first, rest = name.split(".", 1)
        renamed[name] = f"{names.get(first, first)}.{rest}"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
    state = {renamed[name]: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    joined = state.pop("attn.conv1d.weight", None)
    if joined is not None:
        sizes = [ours.get_parameter(f"attn.{x}_conv1d.weight").shape[0] for x in "qkv"]
        state |= {f"attn.{x}_conv1d.weight": y for x, y in zip("qkv", joined.split(sizes), strict=True)}
    ours.load_state_dict(state)
    return {theirs: name for theirs, name in renamed.items() if name != "attn.conv1d.weight"}


def compare(theirs: nn.Module, ours: LrnnBlock, renamed: dict[str, str], **inputs):
    """Compare outputs and all gradients for the same x and the same gradient of the output."""
    x = torch.randn(2, 150, 64, generator=torch.Generator().manual_seed(1))
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ys = [theirs(xs[0], **inputs), ours(xs[1], None, None, None, None)]
    dy = torch.randn(2, 150, 64, generator=torch.Generator().manual_seed(2))
    for y in ys:
        y.backward(dy)
    pairs = {"output": ys, "gradient of x": [x.grad for x in xs]}
    pairs |= {n: [theirs.get_parameter(n).grad, ours.get_parameter(m).grad] for n, m in renamed.items()}
    for name, (truth, found) in pairs.items():
        assert (found - truth).norm() < 1e-5 * truth.norm(), name


@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_the_layer_of_gated_deltanet(allow_neg_eigval):
    torch.manual_seed(0)
    theirs = olmo.OlmoHybridLinearAttentionDecoderLayer(olmo_config(allow_neg_eigval), 0)
    heads = {"num_heads": 4, "head_dim": 16, "allow_neg_eigval": allow_neg_eigval}
    ours = LrnnBlock(LrnnConfig(**SIZES, **heads, gated_norm_eps=1e-5), 0)
    compare(theirs, ours, copy_weights(theirs, ours, LINEAR))


class Mixed(nn.Module):
    """A mixer of lrnn in the place of the class's own."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, **options):
        return self.mixer(hidden_states, None, None, None, None), None


def test_norms_of_outputs():
    """The class has them around attention; here both layers have the same mixer, which is another one."""
    torch.manual_seed(0)
    theirs = olmo.OlmoHybridAttentionDecoderLayer(olmo_config(True), 1)
    ours = LrnnBlock(LrnnConfig(**SIZES, mixer="transformer", num_heads=4, head_dim=16, norm_position="post"), 1)
    theirs.self_attn = ours.attn
    copied = copy_weights(theirs, ours, ATTENTION)
    theirs.self_attn = Mixed(LrnnBlock(LrnnConfig(**SIZES, mixer="transformer", num_heads=4, head_dim=16), 1).attn)
    theirs.self_attn.mixer.load_state_dict(ours.attn.state_dict())
    compare(theirs, ours, {n.replace("self_attn.", "self_attn.mixer."): m for n, m in copied.items()})


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_fields_of_plain_models_stay_as_they_were(norm_position, tmp_path):
    config = LrnnConfig(**SIZES, norm_position=norm_position, gated_norm_eps=1e-5)
    config.save_pretrained(tmp_path)
    again = LrnnConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.norm_position == norm_position
    assert ("norm_position" in config.to_dict()) == (norm_position == "post")
    assert "gated_norm_eps" not in LrnnConfig().to_dict()
