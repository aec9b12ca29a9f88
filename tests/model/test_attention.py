"""Compare attention with the attention of transformers' models in float64, and with a mask of all pairs of tokens."""

import sys
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from mixer_models import largest
from transformers import LlamaConfig, Olmo2Config, Olmo3Config, Qwen3Config, Qwen3NextConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lrnn import LrnnConfig
from lrnn.model.attention import attend
from lrnn.model.mixer_attention import Attention

HIDDEN, HEADS, HEAD_DIM, T = 48, 6, 8, 40
SIZE = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 4, "rms_norm_eps": 1e-6}


def theirs(config, kv_heads: int, window: int | None, theta: float | None):
    """Return transformers' attention in float64 with random weights, and what it is called with besides its input."""
    name = type(config).__name__.removesuffix("Config")
    with patch.dict(sys.modules, {"fla": None}):  # Qwen3-Next's module would import it, which takes long
        module = import_module(type(config).__module__.replace("configuration", "modeling"))
    config._attn_implementation = "sdpa"
    config.head_dim, config.num_key_value_heads = HEAD_DIM, kv_heads
    attention = getattr(module, f"{name}Attention")(config, 0).double()
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    sees = (behind >= 0) & (behind < (window or T))
    mask = torch.zeros(1, 1, T, T).double().masked_fill(~sees, float("-inf"))
    rotary = torch.ones(1, T, HEAD_DIM).double(), torch.zeros(1, T, HEAD_DIM).double()  # cosines and sines of angle 0
    if theta is not None:
        llama = LlamaConfig(head_dim=HEAD_DIM, rope_parameters={"rope_type": "default", "rope_theta": theta})
        rotary = LlamaRotaryEmbedding(llama)(torch.zeros(1, T, 1).double(), torch.arange(T)[None])
    return attention, {"position_embeddings": rotary, "attention_mask": mask}


def with_weights_of(attention: torch.nn.Module, **fields) -> Attention:
    """Return ours with the same weights."""
    config = LrnnConfig(mixer="attention", hidden_size=HIDDEN, num_heads=HEADS, head_dim=HEAD_DIM, **fields)
    mixer = Attention(config, 0).double()
    weights = gated_apart(attention.state_dict(), mixer)
    if config.attention_gate:
        weights |= {name: 1 + weights[name] for name in ("q_norm.weight", "k_norm.weight")}  # around 0 in Qwen3-Next
    mixer.load_state_dict(weights)
    return mixer


def gated_apart(weights: dict[str, torch.Tensor], mixer: Attention) -> dict[str, torch.Tensor]:
    """Return weights of transformers, or their gradients, under our names.

    Qwen3-Next has one projection for queries and gates, whose rows alternate by head.
    """
    if mixer.g_proj is None:
        return weights
    q, g = weights["q_proj.weight"].view(HEADS, 2, HEAD_DIM, HIDDEN).transpose(0, 1).flatten(1, 2).unbind()
    return weights | {"q_proj.weight": q, "g_proj.weight": g}


CASES = {
    "llama": (LlamaConfig, 2, {}),
    "llama without positions": (LlamaConfig, 2, {"rope_theta": None}),
    "llama with one key head": (LlamaConfig, 1, {"rope_theta": 500_000.0}),
    "olmo 2": (Olmo2Config, 3, {"qk_norm": "projection"}),
    "olmo 3 with a window": (Olmo3Config, 6, {"qk_norm": "projection", "sliding_window": 7}),
    "olmo 2 without positions": (Olmo2Config, 6, {"qk_norm": "projection", "rope_theta": None}),
    "qwen 3": (Qwen3Config, 2, {"qk_norm": "head", "rope_theta": 1e6}),
    "qwen 3 next": (Qwen3NextConfig, 2, {"qk_norm": "head", "attention_gate": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_those_of_transformers(case):
    torch.manual_seed(0)
    kind, kv_heads, fields = CASES[case]
    theta = fields.get("rope_theta", 10_000.0)
    attention, arguments = theirs(kind(**SIZE), kv_heads, fields.get("sliding_window"), theta)
    mixer = with_weights_of(attention, num_kv_heads=kv_heads, **fields)
    x, direction = torch.randn(2, 1, T, HIDDEN, dtype=torch.float64).unbind()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = attention(hidden_states=inputs[0], **arguments)[0]
    found = mixer(inputs[1], None, None, None, None)
    # Frequencies of rotary positions are float32 in both, and differ by their last bit. So are the norms of theirs.
    precision = 1e-12 if (theta, fields.get("qk_norm")) == (None, None) else 1e-6
    assert largest(expected) > 0.1 and largest(found - expected) < precision * largest(expected)
    expected.backward(direction)
    found.backward(direction)
    gradients = gated_apart({name: p.grad for name, p in attention.named_parameters()}, mixer)
    for name, gradient in {"x": inputs[0].grad, **gradients}.items():
        ours = inputs[1].grad if name == "x" else mixer.get_parameter(name).grad
        assert largest(ours - gradient) < precision * largest(gradient), name


def with_a_mask(q, k, v, window, cu_seqlens):
    """Return `attend` by the definition: softmax over a row of all scores."""
    B, T, H, D = q.shape
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    behind = torch.arange(T)[:, None] - torch.arange(T)
    sees = ((behind >= 0) & (behind < (window or T))).expand(B, 1, T, T)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(B * T), cu_seqlens, right=True).view(B, 1, T)
        sees = sees & (document[..., None] == document[..., None, :])
    scores = torch.einsum("bthd, bshd -> bhts", q, k) / D**0.5
    return torch.einsum("bhts, bshd -> bthd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(
    ("kv_heads", "window"), [(4, None), (2, 1), (1, 2), (2, 50), (1, 129), (4, 279), (2, 280), (1, 1000)]
)
@pytest.mark.parametrize("boundaries", [None, [0, 1, 1, 100, 280, 430, 560]])
def test_attention_without_a_mask_equals_that_with_one(kv_heads, window, boundaries):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 280, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    direction = torch.randn_like(q)
    results = []
    for function in (attend, with_a_mask):
        o = function(q, k, v, window, cu_seqlens)
        results.append((o, *torch.autograd.grad(o, (q, k, v), direction)))
    for ours, theirs in zip(*results, strict=True):
        assert largest(ours - theirs) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads; got 4 and 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer or null; got 0"),
        ({"head_dim": 7}, "head_dim of attention must be even for rotary positions, or rope_theta null; got 7"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, or null for no positions; got 0"),
        ({"qk_norm": "heads"}, "qk_norm must be null, 'head' or 'projection'; got 'heads'"),
        ({"sliding_window": 0}, "sliding_window must be a positive integer or null; got 0"),
        ({"sliding_window": 2.0}, "sliding_window must be a positive integer or null; got 2.0"),
        ({"attention_gate": 1}, "attention_gate must be true or false; got 1"),
    ],
)
def test_what_attention_cannot_have_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        LrnnConfig(**{"mixer": "attention", "num_heads": 4, "head_dim": 8, **fields})
    assert str(error.value) == message


def test_another_mixer_refuses_the_options_of_attention():
    with pytest.raises(ValueError, match="sliding_window = 64 is for the mixers attention, not for gla"):
        LrnnConfig(mixer="gla", sliding_window=64)


def test_an_odd_head_size_without_positions_is_taken():
    assert LrnnConfig(mixer="attention", head_dim=7, rope_theta=None).head_dim == 7


def test_config_json_has_the_options_that_are_used_alone():
    options = {"num_kv_heads", "rope_theta", "rope_scaling", "qk_norm", "sliding_window", "attention_gate"}
    assert not options & LrnnConfig(mixer="attention").to_diff_dict().keys()
    without = LrnnConfig(mixer="attention", rope_theta=None, attention_gate=True).to_diff_dict()
    assert options & without.keys() == {"rope_theta", "attention_gate"} and without["rope_theta"] is None
