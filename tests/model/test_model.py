"""The model against a NumPy implementation of it, and the properties that training and generation rest on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.cache import LrnnCache
from lrnn.model.configuration_lrnn import OPTIONS
from lrnn.model.mixers import MIXERS as ALL_MIXERS

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
}
MIXERS = ["gated_deltanet", "deltanet"]


def make_model(**config) -> LrnnForCausalLM:
    """Return a model in which every parameter affects the logits."""
    torch.manual_seed(0)
    model = LrnnForCausalLM(LrnnConfig(**{**SIZE, **config}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(std=0.2)
            elif "norm" in name:
                p.uniform_(0.5, 1.5)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


# ---- an independent implementation, token by token in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def numpy_convolution(x, weight):
    """y[t] = silu(sum_i weight[:, i] x[t - taps + 1 + i]), zeros before the start. x [T, D], weight [D, 1, taps]."""
    taps = weight.shape[-1]
    y = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(taps):
            if t - taps + 1 + i >= 0:
                y[t] += weight[:, 0, i] * x[t - taps + 1 + i]
    return silu(y)


def numpy_mixer(x, w, config):
    H, D = config.num_heads, config.head_dim
    q, k, v = (numpy_convolution(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]).reshape(-1, H, D) for n in "qkv")
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    beta = (2 if config.allow_neg_eigval else 1) * sigmoid(x @ w["b_proj.weight"].T)
    gated = config.mixer == "gated_deltanet"
    if gated:
        alpha = np.exp(-np.exp(w["A_log"]) * np.log1p(np.exp(x @ w["a_proj.weight"].T + w["dt_bias"])))
        gate = silu(x @ w["g_proj.weight"].T).reshape(-1, H, D)
    out = np.zeros_like(v)
    for h in range(H):
        S = np.zeros((D, D))
        for t in range(len(x)):
            key = k[t, h][:, None]
            S = S - beta[t, h] * key @ (key.T @ S)
            S = (alpha[t, h] if gated else 1.0) * S + beta[t, h] * key * v[t, h]
            out[t, h] = S.T @ q[t, h] / np.sqrt(D)
    out = rms_norm(out, w["o_norm.weight"], config.norm_eps)
    if gated:
        out = out * gate
    return out.reshape(-1, H * D) @ w["o_proj.weight"].T


def numpy_logits(model: LrnnForCausalLM, ids) -> np.ndarray:
    """Return the logits [T, vocab] of one sequence."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    config = model.config
    x = w["model.embeddings.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = {n.removeprefix(f"model.layers.{i}."): p for n, p in w.items() if n.startswith(f"model.layers.{i}.")}
        mixer = {n.removeprefix("attn."): p for n, p in layer.items() if n.startswith("attn.")}
        x = x + numpy_mixer(rms_norm(x, layer["attn_norm.weight"], config.norm_eps), mixer, config)
        y = rms_norm(x, layer["mlp_norm.weight"], config.norm_eps)
        y = silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
        x = x + y @ layer["mlp.down_proj.weight"].T
    head = w["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return rms_norm(x, w["model.norm.weight"], config.norm_eps) @ head.T


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_logits_equal_those_of_numpy(mixer, allow_neg_eigval):
    model = make_model(mixer=mixer, allow_neg_eigval=allow_neg_eigval, conv_size=3 + allow_neg_eigval)
    ids = tokens(1, 100)
    truth = numpy_logits(model, ids[0].numpy())
    assert np.abs(truth).max() > 1
    with torch.no_grad():
        assert largest(model(ids).logits[0] - torch.from_numpy(truth)) < 1e-4


def test_tied_head():
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    ids = tokens(1, 20)
    with torch.no_grad():
        assert largest(model(ids).logits[0] - torch.from_numpy(numpy_logits(model, ids[0].numpy()))) < 1e-4


# ---- generation


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 11], [2, 18], [19, 1]])
def test_continuing_from_a_cache(mixer, cuts):
    model = make_model(mixer=mixer)
    ids = tokens(2, 20)
    cache, pieces = None, []
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        for piece in ids.split(cuts, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert isinstance(cache, LrnnCache) and cache.get_seq_length() == 20
    assert largest(torch.cat(pieces, 1) - full) < 1e-4


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_generation_equals_that_of_full_forward_passes(mixer):
    model = make_model(mixer=mixer)
    ids = tokens(2, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(15):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert len(expected[:, 9:].unique()) > 4
    assert torch.equal(
        model.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=-1, pad_token_id=0), expected
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_on_the_left_is_exact(mixer):
    model = make_model(mixer=mixer)
    short, long = tokens(1, 5), tokens(1, 70, seed=1)
    pad = 65
    batch = torch.cat([F.pad(short, (pad, 0), value=3), long])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    with torch.no_grad():
        out = model(batch, attention_mask=mask, use_cache=True)
        alone = model(short, use_cache=True)
        # The first tokens of the text have no convolution inputs before them, as at the start of a sequence.
        assert largest(out.logits[0, pad:] - alone.logits[0]) < 1e-5
        assert largest(out.logits[1] - model(long).logits[0]) < 1e-5
        for layer in range(2):
            padded, single = out.past_key_values.layers[layer].state[0], alone.past_key_values.layers[layer].state[0]
            assert largest(padded - single) < 1e-5 < largest(single)
        assert largest(model(batch).logits[0, pad:] - alone.logits[0]) > 1e-2  # without the mask


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_leaves_the_state_as_it_is(mixer):
    """This holds behind a text too, where convolutions still see the text and the gate would continue to decay."""
    model = make_model(mixer=mixer)
    ids = tokens(2, 20)
    padded = F.pad(ids, (0, 50), value=3)
    mask = (torch.arange(70) < 20).long().expand(2, 70)
    with torch.no_grad():
        before = model(ids, use_cache=True).past_key_values.layers
        after = model(padded, attention_mask=mask, use_cache=True).past_key_values.layers
        unmasked = model(padded, use_cache=True).past_key_values.layers
    for a, b, c in zip(before, after, unmasked, strict=True):
        assert largest(a.state - b.state) < 1e-5 and largest(a.state - c.state) > 1e-2


def test_a_cache_can_be_reordered_and_repeated_but_not_cropped():
    model = make_model()
    ids = tokens(3, 8)
    step = tokens(3, 1, seed=1)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        got = model(step, past_key_values=cache).logits
        assert largest(got - model(torch.cat([ids[[2, 0, 0]], step], 1)).logits[:, -1:]) < 1e-5
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        got = model(step.repeat_interleave(2, 0), past_key_values=cache).logits
        assert largest(got - model(torch.cat([ids, step], 1)).logits[:, -1:].repeat_interleave(2, 0)) < 1e-5
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(3)


def test_logits_to_keep():
    model = make_model()
    ids = tokens(2, 10)
    with torch.no_grad():
        full = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=3).logits, full[:, -3:])
        assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])


# ---- packed documents


BOUNDARIES = torch.tensor([0, 30, 33, 100, 140, 200], dtype=torch.int32)  # two rows of 100


def documents(x: torch.Tensor) -> list[torch.Tensor]:
    flat = x.flatten(0, 1)
    return [flat[a:b] for a, b in zip(BOUNDARIES[:-1].tolist(), BOUNDARIES[1:].tolist(), strict=True)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_equal_each_one_alone(mixer):
    model = make_model(mixer=mixer)
    ids = tokens(2, 100)
    with torch.no_grad():
        packed = documents(model(ids, cu_seqlens=BOUNDARIES).logits)
        for logits, document in zip(packed, documents(ids), strict=True):
            assert largest(logits - model(document[None]).logits[0]) < 1e-4
        assert largest(documents(model(ids).logits)[1] - packed[1]) > 1e-2  # boundaries matter


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_depends_on_no_other(mixer):
    """If one document changes, others keep their logits bitwise, and the loss of one has no gradient in others."""
    model = make_model(mixer=mixer)
    ids = tokens(2, 100)
    changed = ids.clone()
    changed[0, 30:33] = (changed[0, 30:33] + 1) % SIZE["vocab_size"]
    with torch.no_grad():
        before = documents(model(ids, cu_seqlens=BOUNDARIES).logits)
        after = documents(model(changed, cu_seqlens=BOUNDARIES).logits)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 1)
    embedded = model.model.embeddings(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, cu_seqlens=BOUNDARIES)
    documents(model(inputs_embeds=embedded, cu_seqlens=BOUNDARIES).logits)[2].square().sum().backward()
    for i, gradient in enumerate(documents(embedded.grad)):
        assert (largest(gradient) == 0) == (i != 2)


def test_gradients_of_packed_documents_are_the_sum_of_those_of_each_alone():
    model = make_model().train()
    ids, labels = tokens(2, 100), tokens(2, 100, seed=1)
    model(ids, shift_labels=labels, cu_seqlens=BOUNDARIES, num_items_in_batch=1).loss.backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document, label in zip(documents(ids), documents(labels), strict=True):
        model(document[None], shift_labels=label[None], num_items_in_batch=1).loss.backward()
    for name, p in model.named_parameters():
        assert largest(p.grad - packed[name]) < 1e-4 * largest(p.grad), name


# ---- loss and training


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy per token by its definition, in float64."""
    logits = logits.double()
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0, logits.exp().sum(-1).log() - picked)


@pytest.mark.parametrize("small", [0, 2**24])
def test_shift_labels_loss(monkeypatch, small):
    monkeypatch.setattr("lrnn.model.modeling_lrnn.LOSS_CHUNK", 17)  # several pieces, the last one shorter
    monkeypatch.setattr("lrnn.model.modeling_lrnn.SMALL_LOGITS", small)
    model = make_model()
    ids, labels = tokens(2, 30), tokens(2, 30, seed=1)
    labels[0, :7] = labels[1, -1] = -100
    terms = cross_entropy(model(ids).logits, labels)
    out = model(ids, shift_labels=labels)
    assert out.logits is None
    assert abs(out.loss.item() - terms.sum().item() / 52) < 1e-5
    assert abs(model(ids, shift_labels=labels, num_items_in_batch=10).loss.item() - terms.sum().item() / 10) < 1e-4


def test_labels_are_shifted_by_one():
    model = make_model()
    ids = tokens(2, 30)
    out = model(ids, labels=ids)
    truth = cross_entropy(out.logits[:, :-1], ids[:, 1:]).mean().item()
    assert abs(out.loss.item() - truth) < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradient_checkpointing_gives_the_same_gradients(mixer):
    model = make_model(mixer=mixer).train()
    ids = tokens(2, 70)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, shift_labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    forwards = []
    # A pre-hook counts, because the recomputation ends inside the layer, at the last tensor that backward needs.
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = gradients()
    assert len(forwards) == 2  # it was recomputed
    for name, gradient in plain.items():
        assert torch.equal(gradient, saved[name]), name
        assert largest(gradient) > 0, name


def test_autocast_keeps_the_state_in_float32():
    model = make_model()
    ids = tokens(1, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(ids, use_cache=True)
    assert out.logits.dtype == torch.bfloat16 and out.past_key_values.layers[0].state.dtype == torch.float32
    with torch.no_grad():
        full = model(ids).logits
    assert largest(out.logits.float() - full) < 0.1 * largest(full)


# ---- parameters


@pytest.mark.parametrize("allow_neg_eigval, top", [(True, 2.0), (False, 1.0)])
def test_range_of_beta(allow_neg_eigval, top, monkeypatch):
    """Check the values that reach the recurrence, for b from 0 to extreme values."""
    from lrnn.kernels.reference import delta_rule as delta_rule_reference

    model = make_model(allow_neg_eigval=allow_neg_eigval)
    seen = {}

    def record(q, k, v, beta, g, *rest):
        seen.update(g=g, beta=beta, k=k)
        return original(q, k, v, beta, g, *rest)

    original = delta_rule_reference._chunkwise
    monkeypatch.setattr(delta_rule_reference, "_chunkwise", record)
    raw = {}
    model.model.layers[1].attn.b_proj.register_forward_hook(lambda module, args, out: raw.update(b=out))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.b_proj.weight.mul_(10)
        model(tokens(2, 200))
    beta = seen["beta"]
    assert 0 <= beta.min() < 0.05 * top and 0.95 * top < beta.max() <= top
    assert torch.equal(beta > top / 2, raw["b"] > 0)  # beta of half the range at b = 0: eigenvalue 0, or one half
    assert largest(seen["k"].norm(dim=-1) - 1) < 1e-3
    assert seen["g"].max() <= 0


@pytest.mark.parametrize("seed", range(3))
def test_gates_start_finite_with_many_heads(seed):
    torch.manual_seed(seed)
    config = LrnnConfig(**{**SIZE, "num_heads": 20_000, "head_dim": 1, "hidden_size": 1, "num_hidden_layers": 1})
    attn = LrnnForCausalLM(config).model.layers[0].attn
    A, dt = attn.A_log.exp(), F.softplus(attn.dt_bias)
    assert attn.A_log.isfinite().all() and attn.dt_bias.isfinite().all()
    assert A.min() > 0 and A.max() <= 16 and abs(A.mean() - 8) < 0.3  # uniform in (0, 16)
    assert dt.min() > 0.99e-3 and dt.max() < 0.101 and abs(dt.log().mean() - np.log(0.01)) < 0.1  # log-uniform


def test_gates_start_finite_at_the_ends_of_their_ranges(monkeypatch):
    """uniform_(0, 16) sometimes returns exactly 0, and its logarithm would be minus infinity."""
    attn = make_model().model.layers[0].attn
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(low))
    for parameter in (attn.A_log, attn.dt_bias):
        parameter.data.fill_(float("nan"))
        parameter._is_hf_initialized = False
    attn.reset_parameters()
    assert attn.A_log.isfinite().all() and attn.dt_bias.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_are_float32_in_a_low_precision_model(tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded, info = LrnnForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, p in loaded.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            assert p.dtype == torch.float32 and torch.equal(p, model.get_parameter(name)), name
        else:
            assert p.dtype == dtype, name
    with torch.no_grad():
        assert loaded(tokens(1, 10)).logits.dtype == dtype


def test_a_new_model_depends_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(seed)
        return LrnnForCausalLM(LrnnConfig(**SIZE)).state_dict()

    a, b, c = weights(0), weights(0), weights(1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["model.layers.0.attn.A_log"], c["model.layers.0.attn.A_log"])
    assert abs(a["lm_head.weight"].std() - 0.02) < 0.002


# ---- configuration


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("mixer", "lstm", f"mixer 'lstm' is not one of {', '.join(ALL_MIXERS)}"),
        ("num_householder", 5, "num_householder must be 1, 2, 3 or 4; got 5"),
        ("state_size", 0, "state_size must be a positive integer; got 0"),
        ("num_heads", 0, "num_heads must be a positive integer; got 0"),
        ("head_dim", 12.5, "head_dim must be a positive integer; got 12.5"),
        ("hidden_size", -32, "hidden_size must be a positive integer; got -32"),
        ("conv_size", "4", "conv_size must be a positive integer; got '4'"),
        ("num_value_heads", 0, "num_value_heads must be a positive integer or null; got 0"),
        ("num_value_heads", 24, "num_value_heads must be a multiple of num_heads, 16; got 24"),
        ("num_value_heads", 8, "num_value_heads must be a multiple of num_heads, 16; got 8"),
        ("head_v_dim", True, "head_v_dim must be a positive integer or null; got True"),
        ("delta_rule_precision", "fast", "delta_rule_precision 'fast' is not one of standard, split"),
    ],
)
def test_bad_configuration(field, value, message):
    with pytest.raises(ValueError) as error:
        LrnnConfig(**{field: value})
    assert str(error.value) == message


@pytest.mark.parametrize("mixer", ALL_MIXERS)
@pytest.mark.parametrize("option, value", [("num_value_heads", 32), ("head_v_dim", 64)])
def test_options_of_other_mixers_are_refused(mixer, option, value):
    able = "deltanet, gated_deltanet, deltaproduct, gated_deltaproduct"
    if mixer in able.split(", "):
        assert getattr(LrnnConfig(mixer=mixer, **{option: value}), option) == value
        return
    with pytest.raises(ValueError) as error:
        LrnnConfig(mixer=mixer, **{option: value})
    assert str(error.value) == f"{option} = {value} is for the mixers {able}, not for {mixer}"


def test_options_at_their_default_are_not_written(tmp_path):
    LrnnConfig().save_pretrained(tmp_path / "plain")
    LrnnConfig(num_value_heads=32, head_v_dim=64).save_pretrained(tmp_path / "set")
    plain, chosen = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "set"))
    assert chosen == plain | {"num_value_heads": 32, "head_v_dim": 64}
    assert not OPTIONS.keys() & (plain.keys() | LrnnConfig().to_dict().keys())
    loaded = LrnnConfig.from_pretrained(tmp_path / "set")
    assert (loaded.num_value_heads, loaded.head_v_dim) == (32, 64)


def test_configuration_is_the_same_after_saving_and_loading(tmp_path):
    config = LrnnConfig(**SIZE, mixer="deltanet", allow_neg_eigval=False, tie_word_embeddings=True, norm_eps=1e-5)
    config.delta_rule_precision = "split"
    config.save_pretrained(tmp_path)
    assert LrnnConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
