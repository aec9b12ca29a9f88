"""Test what generation and training need of every token mixer: caches, padding, packed documents, precision, files."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixer_models import SIZE, VARIANTS, WITHOUT_RANGE, every_case, every_variant, largest, make_model, tokens

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model import mixer_deltanet
from lrnn.pretrain.metrics.eigenvalues import EigenvalueProbe
from lrnn.pretrain.optim import has_other_groups_by_shape, parameter_groups


def states(cache, layer: int = 0) -> tuple[torch.Tensor, ...]:
    state = cache.layers[layer].state
    return state if isinstance(state, tuple) else (state,)


def has_recurrent_state(model) -> bool:
    return model.config.mixer not in ("attention", "transformer")


# ---- generation


@every_case
@pytest.mark.parametrize("cuts", [[1] * 20, [50, 1, 1, 18]])
def test_continuing_from_a_cache(variant, allow_neg_eigval, cuts):
    model = make_model(variant, allow_neg_eigval, num_hidden_layers=2)
    ids = tokens(2, sum(cuts))
    cache, pieces = None, []
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        for piece in ids.split(cuts, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert largest(torch.cat(pieces, 1) - full) < 2e-4
        if has_recurrent_state(model):
            assert all(x.dtype == torch.float32 for x in states(cache))


@every_variant
def test_cache_can_be_reordered_and_repeated(variant):
    model = make_model(variant)
    ids, step = tokens(3, 8), tokens(3, 1, seed=1)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        got = model(step, past_key_values=cache).logits
        assert largest(got - model(torch.cat([ids[[2, 0, 0]], step], 1)).logits[:, -1:]) < 1e-4
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        got = model(step.repeat_interleave(2, 0), past_key_values=cache).logits
        assert largest(got - model(torch.cat([ids, step], 1)).logits[:, -1:].repeat_interleave(2, 0)) < 1e-4


@every_case
def test_padding_on_the_left_changes_nothing(variant, allow_neg_eigval):
    model = make_model(variant, allow_neg_eigval, num_hidden_layers=2)
    short, long, step = tokens(1, 5), tokens(1, 70, seed=1), tokens(2, 1, seed=2)
    pad = 65
    batch = torch.cat([F.pad(short, (pad, 0), value=3), long])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    with torch.no_grad():
        out = model(batch, attention_mask=mask, use_cache=True)
        alone = model(short, use_cache=True)
        assert largest(out.logits[0, pad:] - alone.logits[0]) < 1e-4
        assert largest(out.logits[1] - model(long).logits[0]) < 1e-4
        assert largest(model(batch).logits[0, pad:] - alone.logits[0]) > 1e-2  # without the mask
        if has_recurrent_state(model):
            for padded, single in zip(states(out.past_key_values, 1), states(alone.past_key_values, 1), strict=True):
                assert largest(padded[:1] - single) < 1e-4 * max(1, largest(single))
        more = model(step, past_key_values=out.past_key_values).logits
        assert largest(more[:1] - model(step[:1], past_key_values=alone.past_key_values).logits) < 1e-4


@every_variant
def test_padding_behind_a_text_leaves_the_state_as_it_is(variant):
    model = make_model(variant)
    ids = tokens(2, 20)
    mask = (torch.arange(70) < 20).long().expand(2, 70)
    step = tokens(2, 1, seed=2)
    with torch.no_grad():
        before = model(ids, use_cache=True).past_key_values
        after = model(F.pad(ids, (0, 50), value=3), attention_mask=mask, use_cache=True).past_key_values
        if has_recurrent_state(model):
            for a, b in zip(states(before), states(after), strict=True):
                assert largest(a - b) < 1e-5 * max(1, largest(a))
        got = model(step, past_key_values=after).logits
        assert largest(got - model(step, past_key_values=before).logits) < 1e-4


# ---- packed documents

BOUNDARIES = torch.tensor([0, 30, 33, 100, 140, 200], dtype=torch.int32)  # two rows of 100


def documents(x: torch.Tensor) -> list[torch.Tensor]:
    flat = x.flatten(0, 1)
    return [flat[a:b] for a, b in zip(BOUNDARIES[:-1].tolist(), BOUNDARIES[1:].tolist(), strict=True)]


@every_case
def test_packed_documents_equal_each_one_alone(variant, allow_neg_eigval):
    model = make_model(variant, allow_neg_eigval, num_hidden_layers=2).train()
    ids, labels = tokens(2, 100), tokens(2, 100, seed=1)
    with torch.no_grad():
        packed = documents(model(ids, cu_seqlens=BOUNDARIES).logits)
        for logits, document in zip(packed, documents(ids), strict=True):
            assert largest(logits - model(document[None]).logits[0]) < 1e-4
        assert largest(documents(model(ids).logits)[1] - packed[1]) > 1e-2  # boundaries matter
    model(ids, shift_labels=labels, cu_seqlens=BOUNDARIES, num_items_in_batch=1).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document, label in zip(documents(ids), documents(labels), strict=True):
        model(document[None], shift_labels=label[None], num_items_in_batch=1).loss.backward()
    for name, p in model.named_parameters():
        assert largest(p.grad - gradients[name]) < 2e-4 * largest(p.grad), name


# ---- training


@every_case
def test_a_new_model_learns(variant, allow_neg_eigval):
    torch.manual_seed(0)
    model = LrnnForCausalLM(
        LrnnConfig(**{**SIZE, **VARIANTS[variant]}, allow_neg_eigval=allow_neg_eigval, num_hidden_layers=1)
    )
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    ids = tokens(4, 40)
    losses = []
    for _ in range(6):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and (largest(p.grad) > 0 or len(losses) == 0), name
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(x) for x in losses) and losses[-1] < losses[0] - 0.1


@every_variant
def test_every_parameter_has_an_initial_value(variant):
    model = make_model(variant)
    for p in model.parameters():
        p.data.fill_(float("nan"))
        p._is_hf_initialized = False
    for module in model.modules():
        model._init_weights(module)
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not name.endswith(".D") or (p == 1).all()


@every_variant
def test_autocast_keeps_the_state_in_float32(variant):
    model = make_model(variant)
    ids = tokens(1, 20)
    with torch.no_grad():
        full = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    if has_recurrent_state(model):
        assert all(x.dtype == torch.float32 for x in states(out.past_key_values))
    assert largest(out.logits.float() - full) < 0.15 * largest(full)


@every_variant
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    model = make_model(variant).train()
    ids = tokens(2, 40)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, shift_labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        assert torch.equal(plain[name], gradient), name


@every_variant
def test_saved_and_loaded(variant, tmp_path):
    model = make_model(variant)
    model.save_pretrained(tmp_path)
    loaded = LrnnForCausalLM.from_pretrained(tmp_path)
    for field, value in model.config.to_dict().items():
        assert field in ("dtype", "_name_or_path") or loaded.config.to_dict()[field] == value, field
    for name, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
    low, info = LrnnForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, p in low.named_parameters():
        gate = name.endswith(("A_log", "dt_bias", "gate_bias"))
        assert p.dtype == (torch.float32 if gate else torch.bfloat16), name
    with torch.no_grad():
        logits = low.eval()(tokens(1, 10)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@every_variant
def test_weight_decay_is_for_matrices(variant):
    model = make_model(variant)
    decayed = {id(p) for p in parameter_groups(model, 0.1)[0]["params"]}
    for name, p in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "bias", ".D", "norm.weight", "conv1d.weight", "_k", "_a")):
            assert id(p) not in decayed, name
        elif name.endswith(("_proj.weight", "embeddings.weight", "lm_head.weight", ".recurrent")):
            assert id(p) in decayed, name


@every_variant
def test_only_gate_biases_and_recurrent_matrices_change_groups_of_earlier_versions(variant):
    model = make_model(variant)
    new, old = ({id(p) for p in parameter_groups(model, 0.1, by_shape)[0]["params"]} for by_shape in (False, True))
    changed = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) in new ^ old}
    assert changed == {"mlstm": {"gate_bias"}, "slstm": {"gate_bias", "recurrent"}}.get(model.config.mixer, set())
    assert has_other_groups_by_shape(model) == bool(changed)


@every_variant
def test_the_probe_reads_every_mixer_with_a_range(variant):
    model = make_model(variant, num_hidden_layers=2)
    probe = EigenvalueProbe(model)
    ids = tokens(2, 30)
    with torch.no_grad():
        model(ids)
        assert probe.read() == {}  # not armed, so nothing is computed
        probe.arm()
        model(ids)
    found = probe.read()
    if model.config.mixer in WITHOUT_RANGE:
        assert found == {}
        return
    assert set(found["negative_fraction"]) == {"0", "1"}
    for negative, histogram in zip(found["negative_fraction"].values(), found["histogram"], strict=True):
        assert 0 < negative < 1 and abs(sum(histogram) - 1) < 1e-3


def test_the_probe_of_a_hybrid_keeps_the_numbers_of_layers():
    model = make_model("gated_deltanet", mixer=["attention", "gated_deltanet", "slstm", "gla"], num_hidden_layers=6)
    probe = EigenvalueProbe(model)
    probe.arm()
    with torch.no_grad():
        model(tokens(2, 30))
    found = probe.read()
    assert list(found["negative_fraction"]) == ["1", "3", "5"] and len(found["histogram"]) == 3
    assert found == probe.describe(probe.counts())


@pytest.mark.parametrize("mixer", ["gated_deltanet", "deltanet", "gated_deltaproduct", "deltaproduct"])
def test_delta_rule_precision_reaches_the_rule(mixer, monkeypatch):
    """The rule is called with the precision. On a CPU nothing is rounded to 16 bits, so the logits are the same."""
    name = "fused_gated_delta_product" if mixer.endswith("product") else "fused_gated_delta_rule"
    rule, asked = getattr(mixer_deltanet, name), []

    def note(*args, **options):
        asked.append(options["precision"])
        return rule(*args, **options)

    monkeypatch.setattr(mixer_deltanet, name, note)
    variant = mixer + "3" if mixer.endswith("product") else mixer
    logits = [make_model(variant, delta_rule_precision=p)(tokens(1, 9)).logits for p in ("standard", "split")]
    assert asked == ["standard", "split"] and torch.equal(*logits)
