"""Test the fused layers in float32 against the plain layers of the model."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.kernels import gated_rms_norm
from lrnn.kernels.delta_rule import api as delta_rule
from lrnn.kernels.delta_rule.api import saving_states
from lrnn.kernels.short_conv import api as short_conv_api
from lrnn.kernels.short_conv import operator as short_conv
from lrnn.model import layers
from lrnn.model.cache import LrnnCache
from lrnn.pretrain import z_loss
from lrnn.pretrain.fused import loss as fused_loss
from lrnn.pretrain.fused.float8 import Float8Product
from lrnn.pretrain.fused.layers import FusedBlock, fuse, refresh
from lrnn.pretrain.metrics.eigenvalues import EigenvalueProbe
from lrnn.pretrain.state_passing import CarriedLayer

TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # also run the cases that only combine again what others contain
SIZES = {"vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 40, "num_heads": 1}
IDS, LABELS = torch.randint(0, 50, (2, 2, 20), generator=torch.Generator().manual_seed(0)).unbind()
LABELS[0, 5:9] = -100


def pair(mixer="gated_deltanet", norm_position="pre", heads=None, **options):
    """Return the same model with plain and with fused layers."""
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 64} | (heads or {})
    plain = LrnnForCausalLM(LrnnConfig(**sizes, mixer=mixer, norm_position=norm_position)).train()
    with torch.no_grad():  # ones, which norms begin with, would hide where they are
        for name, parameter in plain.named_parameters():
            if name.endswith("_norm.weight"):
                parameter.uniform_(0.5, 1.5)
    fused = copy.deepcopy(plain)
    fuse(fused, torch.float32, **options)
    refresh(fused)
    return plain, fused


def run(model, micro_batches=1, cu_seqlens=None):
    """Return the loss, and add gradients."""
    for _ in range(micro_batches):
        loss = model(IDS, shift_labels=LABELS, cu_seqlens=cu_seqlens, num_items_in_batch=100.0).loss
        loss.backward()
    return loss.item()


def compare(plain, fused, micro_batches=1, bar=2e-5):
    """Compare gradients of so many passes of the fused layers with those of one pass of the plain ones."""
    found = dict(fused.named_parameters())
    truth = {name: micro_batches * p.grad for name, p in plain.named_parameters()}
    errors = {name: ((found[name].grad - d).norm() / d.norm()).item() for name, d in truth.items()}
    assert all(error < bar for error in errors.values()), errors


@pytest.mark.parametrize(
    ("mixer", "packed", "options"),
    [
        ("gated_deltanet", False, {"recompute_mlp": True}),
        ("gated_deltanet", True, {"partitioned": True}),
        ("deltaproduct", True, {}),
        ("attention", False, {}),
        ("attention", False, {"norm_position": "post"}),
        ("attention", True, {"norm_position": "post", "recompute_mlp": True}),
    ],
)
def test_loss_and_gradients(mixer, packed, options, monkeypatch):
    """Two micro-batches, the second of which adds to the gradients of the first, and a loss in several pieces."""
    monkeypatch.setattr(fused_loss, "CHUNK", 24)
    plain, fused = pair(mixer, **options)
    assert (fused.model.layers[0].fused.fused_mixer is None) == (mixer == "attention")
    cu_seqlens = torch.tensor([0, 3, 20, 40], dtype=torch.int32) if packed else None
    assert run(fused, 2, cu_seqlens) == pytest.approx(run(plain, 1, cu_seqlens), rel=1e-6)
    compare(plain, fused, 2)


def test_a_mixer_whose_output_is_normed_is_called_as_it_is():
    layer = pair(norm_position="post")[1].model.layers[0].fused
    assert layer.fused_mixer is None and layer.mlp.norms_output


def test_key_and_value_heads_of_different_numbers_and_sizes(monkeypatch):
    """On packed documents, against the plain layers in float64, which PyTorch computes."""
    plain, fused = pair(heads={"num_heads": 2, "num_value_heads": 4, "head_dim": 12, "head_v_dim": 24})
    assert fused.model.layers[0].fused.fused_mixer is not None
    cu_seqlens = torch.tensor([0, 3, 20, 40], dtype=torch.int32)
    loss = run(fused, 1, cu_seqlens)
    for module in (delta_rule, short_conv_api, gated_rms_norm, layers):
        monkeypatch.setattr(module, "use_kernels", lambda x: False)
    plain.double()
    assert loss == pytest.approx(run(plain, 1, cu_seqlens), rel=1e-6)
    compare(plain, fused)


def test_gradients_of_merged_weights_are_summed_in_place():
    """Those of later micro-batches go into the same memory, unless someone has put other gradients there."""
    plain, fused = pair()
    weights = fused.model.layers[0].fused.fused_mixer.inner[0].weights
    run(fused)
    first = [w.grad.data_ptr() for w in weights]
    run(fused)
    assert [w.grad.data_ptr() for w in weights] == first
    weights[1].grad = weights[1].grad.clone()
    run(fused)
    run(plain)
    compare(plain, fused, 3)


def test_copies_of_weights_are_renewed():
    plain, fused = pair()
    for model in (plain, fused):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-2)
    old = run(fused)
    refresh(fused)
    new = run(fused)
    assert new == pytest.approx(run(plain), rel=1e-6) and new != pytest.approx(old, rel=1e-6)


def test_without_gradients_eigenvalues_and_states():
    plain, fused = pair()
    probes = [EigenvalueProbe(model) for model in (plain, fused)]
    found = []
    for model, probe in zip((plain, fused), probes, strict=True):
        probe.arm()
        with torch.no_grad():
            found.append(model(IDS, shift_labels=LABELS, use_cache=False).loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert torch.equal(probes[0].counts(), probes[1].counts())
    with saving_states():
        run(fused)
    run(plain)
    compare(plain, fused)


@pytest.mark.parametrize("packed", [True, *([False] if TORTURE else [])])
def test_a_state_that_is_passed_on(packed):
    """Two samples, the second of which begins with the state behind the first. Heads are padded for the kernels."""
    cu_seqlens = torch.tensor([0, 3, 20, 40], dtype=torch.int32) if packed else None
    plain, fused = pair(heads={"head_dim": 12, "head_v_dim": 24})
    behind = []
    for model in (plain, fused):
        conv, state = None, None
        for _ in range(2):
            cache = LrnnCache(1)
            cache.layers = [CarriedLayer(conv, state, 20)]
            model(IDS, shift_labels=LABELS, cu_seqlens=cu_seqlens, past_key_values=cache).loss.backward()
            conv, state = cache.layers[0].behind.values()
        behind.append((conv, state))
    assert fused.model.layers[0].fused.fused_mixer is not None
    for found, truth in zip(behind[1], behind[0], strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    compare(plain, fused)


def test_a_cache_and_padding_take_the_plain_layers(monkeypatch):
    _, fused = pair()
    fused.eval()
    monkeypatch.setattr(FusedBlock, "__call__", lambda *_: pytest.fail("a fused layer was called"))
    with torch.no_grad():
        assert fused(IDS, use_cache=True).past_key_values is not None
        fused(IDS, attention_mask=torch.arange(20).expand(2, 20) < 15, use_cache=False)
    with pytest.raises(pytest.fail.Exception):
        fused(IDS, use_cache=False)


def test_gradients_are_written_into_slices():
    """The gradients of q, k, v and the gate lie beside each other in rows that hold more."""
    wide = torch.full((2, 9, 4 * 64 + 6), float("nan"))
    x, dz = torch.randn(2, 9, 4 * 64 + 6), wide.clone()
    parts, found = x.split([64, 64, 64, 64, 6], -1), dz.split([64, 64, 64, 64, 6], -1)
    weights, dys = [torch.randn(64, 1, 4) for _ in range(3)], [torch.randn(2, 9, 64) for _ in range(3)]
    dw = short_conv.write_gradients(list(found[:3]), dys, list(parts[:3]), weights, [], None)
    *dxs, expected = torch.ops.lrnn.short_conv_backward(dys, [p.contiguous() for p in parts[:3]], weights, [], None)
    assert torch.equal(dw, expected) and all(torch.equal(a, b) for a, b in zip(found[:3], dxs, strict=True))
    o, dn, weight = torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32), torch.randn(32)
    gate, dgate, n = parts[3].unflatten(-1, (2, 32)), found[3].unflatten(-1, (2, 32)), torch.empty(2, 9, 2, 32)
    do, dweight = gated_rms_norm.write_gradients(dgate, n, dn, o, gate, weight, 1e-6)
    results = torch.ops.lrnn.gated_rms_norm_backward(dn, o, gate, weight, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((do, dgate, dweight), results, strict=True))
    assert torch.equal(n, gated_rms_norm.gated_rms_norm(o, gate, weight, 1e-6))
    assert dz[..., 256:].isnan().all()
    with pytest.raises(ValueError, match="evenly spaced"):
        short_conv.write_gradients([wide[..., ::4]], [dys[0]], [parts[0]], weights[:1], [], None)


def float8(x):
    """Return x as float8 with a scale per row holds it, in float64."""
    scales = x.abs().amax(1, keepdim=True) / 448
    return (x / scales).to(torch.float8_e4m3fn).double() * scales.double()


def test_products_in_float8():
    """Both operands of y and dx are rounded along the sum, those of dW are not."""
    weights = [torch.nn.Parameter(torch.randn(n, 32)) for n in (16, 48)]
    x, dy, w = torch.randn(5, 32), torch.randn(5, 64), torch.cat([u.detach() for u in weights])
    for refreshed in (False, True):
        product = Float8Product(weights, torch.float32)
        if refreshed:
            product.refresh()
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(product.forward(x).double(), float8(x) @ float8(w).T, **near)
        torch.testing.assert_close(product.input_gradient(dy).double(), float8(dy) @ float8(w.T).T, **near)
    torch.testing.assert_close(torch.cat(product.weight_gradients(dy, x)), dy.T @ x)
    with pytest.raises(UserError, match="multiples of 16, up to 32768; the model has one from 32 to 40"):
        Float8Product([torch.zeros(40, 32)], torch.float32)
    with pytest.raises(UserError, match="the model has one from 32 to 40000"):
        Float8Product([torch.zeros(20000, 32)] * 2, torch.float32)


@pytest.mark.parametrize("mixer", ["gated_deltanet", *(["deltanet"] if TORTURE else [])])
def test_layers_in_float8(mixer):
    """Loss and gradients differ by what float8 rounds; gates, head and embeddings are not among what is rounded."""
    sizes = SIZES | {"intermediate_size": 48}
    torch.manual_seed(0)
    plain = LrnnForCausalLM(LrnnConfig(**sizes, mixer=mixer, head_dim=64)).train()
    fused = copy.deepcopy(plain)
    fuse(fused, torch.float32, float8=True)
    refresh(fused)
    rounded = {id(w) for p in fused.fused_products if isinstance(p, Float8Product) for w in p.weights}
    names = {name.split(".")[-2] for name, p in fused.named_parameters() if id(p) in rounded}
    gate = ["g_proj"] if mixer == "gated_deltanet" else []
    assert names == {"q_proj", "k_proj", "v_proj", *gate, "o_proj", "gate_proj", "up_proj", "down_proj"}
    found, loss = run(fused, 2), run(plain)
    assert found == pytest.approx(loss, rel=2e-3) and found != pytest.approx(loss, rel=1e-6)
    compare(plain, fused, 2, bar=0.2)


@pytest.mark.parametrize("fused", [True, False])
def test_z_loss(fused, monkeypatch):
    """The loss is the cross-entropy, and its gradient that of both. Passes without a gradient do not count."""
    monkeypatch.setattr(fused_loss, "CHUNK", 24)
    monkeypatch.setattr(z_loss, "LOSS_CHUNK", 24)
    monkeypatch.setattr(z_loss, "SMALL_LOGITS", 0)
    torch.manual_seed(0)
    head, coefficient = torch.nn.Linear(48, 50, bias=False), 0.2
    h, labels = torch.randn(40, 48, requires_grad=True), LABELS.flatten()
    loss = fused_loss.FusedLoss(head, torch.float32, coefficient) if fused else z_loss.LossWithZ(head, coefficient)
    leaves = [x.detach().double().requires_grad_() for x in (h, head.weight)]
    logits = leaves[0] @ leaves[1].T
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    z = coefficient * (logits.logsumexp(-1) ** 2)[labels >= 0].sum()
    truth = torch.autograd.grad(entropy + z, leaves)
    with torch.no_grad():
        assert loss(h, labels).item() == pytest.approx(entropy.item(), rel=1e-6) and loss.z_sum is None
    found = loss(h, labels)
    gradients = torch.autograd.grad(found, (h, head.weight))
    assert found.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert loss.z_sum.item() == pytest.approx(z.item(), rel=1e-6)
    for x, y in zip(gradients, truth, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


def test_gradients_in_16_bits_are_scaled_exactly():
    """0.1 is off by 2.4e-4 in float16, which would scale every gradient but the head's."""
    head = torch.nn.Linear(48, 50, bias=False)
    h = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    loss = fused_loss.FusedLoss(head, torch.float16)
    for x in (h, head.weight):
        whole, tenth = (torch.autograd.grad(c * loss(h, LABELS.flatten()), x)[0].double() for c in (1.0, 0.1))
        assert ((whole * tenth).sum() / whole.square().sum()).item() == pytest.approx(0.1, rel=5e-5)
