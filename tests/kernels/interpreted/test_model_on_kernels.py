"""Compare the whole model on the kernels, in float32, with the same model in plain PyTorch."""

import os

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.kernels.delta_rule.portable.backend import Portable
from lrnn.kernels.reference import delta_rule as delta_rule_reference
from lrnn.kernels.reference import gated_rms_norm as gated_rms_norm_reference
from lrnn.kernels.reference import rms_norm as rms_norm_reference
from lrnn.kernels.reference import swiglu as swiglu_reference
from lrnn.kernels.short_conv.api import short_conv
from lrnn.model import layers, mixer_deltanet, modeling_lrnn
from lrnn.model.cache import LrnnCacheLayer
from lrnn.pretrain.engine import build_model

TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # also run the cases that only combine again what others contain
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 64}


@pytest.fixture
def in_pytorch(monkeypatch):
    """Return a function that makes models run in plain PyTorch."""

    def switch():
        for module in (layers, mixer_deltanet):
            monkeypatch.setattr(module, "use_kernels", lambda x: False)
        monkeypatch.setattr(layers, "rms_norm", rms_norm_reference.rms_norm)
        monkeypatch.setattr(modeling_lrnn, "swiglu", swiglu_reference.swiglu)
        monkeypatch.setattr(layers, "gated_rms_norm", gated_rms_norm_reference.gated_rms_norm)
        monkeypatch.setattr(mixer_deltanet, "fused_gated_delta_rule", delta_rule_reference.fused_gated_delta_rule)
        monkeypatch.setattr(mixer_deltanet, "fused_gated_delta_product", delta_rule_reference.fused_gated_delta_product)

    return switch


def make_model(mixer: str, **changes) -> LrnnForCausalLM:
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**SIZES | changes, intermediate_size=48, mixer=mixer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


def losses_and_gradients(model: LrnnForCausalLM, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("mixer", "kind"),
    [
        ("gated_deltanet", "documents"),
        ("gated_deltanet", "padded"),
        ("deltanet", "plain"),
        ("gated_deltanet", "small heads and no convolution"),
        ("gated_deltaproduct", "documents"),
        ("mamba2", "padded"),  # convolutions and norm of the other mixers run on kernels
        ("mlstm", "documents"),
        *([("gated_deltaproduct", "padded")] if TORTURE else []),
    ],
)
def test_logits_and_gradients(mixer, kind, in_pytorch):
    model = make_model(mixer, **({"head_dim": 32, "conv_size": 1} if kind.startswith("small") else {}))
    inputs = {"input_ids": torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))}
    if kind == "documents":
        inputs["cu_seqlens"] = torch.tensor([0, 15, 15, 40, 41, 80])
    if kind == "padded":
        inputs["attention_mask"] = torch.ones(2, 40, dtype=torch.int64)
        inputs["attention_mask"][1, :10] = 0
    ours = losses_and_gradients(model, **inputs)
    in_pytorch()
    plain = losses_and_gradients(model, **inputs)
    if kind == "padded":  # logits at padding do not matter
        ours["logits"], plain["logits"] = ours["logits"][:, 10:], plain["logits"][:, 10:]
    for name, truth in plain.items():
        assert (ours[name] - truth).norm() <= 1e-4 * truth.norm(), name


def test_recomputed_layers_save_their_states(monkeypatch):
    """Layers save states when they are recomputed, and not before. The backward pass then runs no forward scan."""
    filled, forward_scan = [], Portable.forward_scan

    def note(call, operands, initial, final, **results):
        filled.append(set(results))
        forward_scan(call, operands, initial, final, **results)

    monkeypatch.setattr(Portable, "forward_scan", staticmethod(note))
    found = []
    for recompute, scanned in ((False, [{"o"}, {"y", "states"}]), (True, [{"o"}, {"o", "y", "states"}])):
        model = build_model(LrnnConfig(**SIZES), 0, activation_checkpointing=recompute)
        found.append(losses_and_gradients(model, input_ids=torch.arange(20)[None]))
        assert filled == scanned
        filled.clear()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_generation(in_pytorch):
    model = make_model("gated_deltanet").eval()
    prompt = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 2}
    ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    in_pytorch()
    assert torch.equal(ours, model.generate(prompt, attention_mask=torch.ones_like(prompt), **options))


@pytest.fixture
def launches(monkeypatch):
    """Return a list that receives the number of tensors of each call of `short_conv`."""
    counts = []

    def counted(xs, weights, **options):
        counts.append(len(xs))
        return short_conv(xs, weights, **options)

    monkeypatch.setattr(layers, "short_conv", counted)
    return counts


@pytest.mark.parametrize("mixer", ["gated_deltanet", "gated_deltaproduct", "mamba2"])
def test_a_layer_convolves_in_one_launch(mixer, launches):
    model = make_model(mixer)
    losses_and_gradients(model, input_ids=torch.arange(10)[None])
    assert launches == [3]


def make_convolutions():
    torch.manual_seed(3)
    convolutions = [layers.ShortConvolution(size, 4) for size in (8, 8, 12)]
    for convolution in convolutions:
        convolution.reset_parameters()
    return convolutions


def make_inputs(T):
    return [torch.randn(2, T, size, generator=torch.Generator().manual_seed(T)) for size in (8, 8, 12)]


@pytest.mark.parametrize("kind", ["plain", "documents", "continued"])
def test_one_launch_gives_the_results_of_three(kind, launches):
    convolutions, inputs = make_convolutions(), [x.requires_grad_() for x in make_inputs(9)]
    weights = [c.weight for c in convolutions]
    cu_seqlens, cache, before = None, None, [None] * 3
    if kind == "documents":
        cu_seqlens = torch.tensor([0, 4, 4, 11, 18])
    if kind == "continued":
        cache, earlier = LrnnCacheLayer(), make_inputs(5)
        layers.convolve(convolutions, earlier, cache, None, None)
        before = [[x[:, 2:]] for x in earlier]
    launches.clear()
    found = layers.convolve(convolutions, inputs, cache, None, cu_seqlens)
    assert launches == [3]
    expected = [
        short_conv([x], [w], before=b, cu_seqlens=cu_seqlens)[0]
        for x, w, b in zip(inputs, weights, before, strict=True)
    ]
    assert all(torch.equal(y, alone) for y, alone in zip(found, expected, strict=True))
    gradients = [torch.autograd.grad(sum((y * y).sum() for y in ys), (*inputs, *weights)) for ys in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    if cache is not None:
        assert torch.equal(cache.conv, torch.cat(inputs, -1)[:, -3:])


@pytest.mark.parametrize("documents", [False, True])
def test_convolutions_compile_to_one_graph(documents):
    convolutions, inputs = make_convolutions(), make_inputs(9)
    cu_seqlens = torch.tensor([0, 4, 18]) if documents else None
    compiled = torch.compile(layers.convolve, fullgraph=True, backend="aot_eager")
    pairs = [f(convolutions, inputs, None, None, cu_seqlens) for f in (compiled, layers.convolve)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
