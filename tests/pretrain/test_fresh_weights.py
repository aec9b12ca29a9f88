"""Compare weights and random numbers with those that PyTorch draws one after the other."""

import pytest
import torch
from torch import nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.mixers import MIXERS
from lrnn.pretrain.checkpoint.format import BrokenCheckpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.engine import build_model
from lrnn.pretrain.weights import jump, lazy_fills
from lrnn.pretrain.weights.lazy_fills import Fill, LazyFills

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16}


def config(**fields) -> LrnnConfig:
    return LrnnConfig(**SIZES, intermediate_size=70, **fields)


@pytest.fixture
def often(monkeypatch):
    """Jump and change threads often although the models are small."""
    monkeypatch.setattr(jump, "FEW", 1500)
    monkeypatch.setattr(lazy_fills, "LARGE", 3000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.fixture
def runs(monkeypatch):
    """Record the sizes of fills that are computed."""
    sizes, run = [], Fill.run
    monkeypatch.setattr(Fill, "run", lambda fill, generator: (sizes.append(fill.tensor.numel()), run(fill, generator)))
    return sizes


def test_the_polynomial_is_that_of_the_paper():
    assert len(jump._lower_terms()) == 134  # 135 terms with x^19937


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
def test_a_jump_is_that_many_draws(often, before):
    generator, other = torch.Generator().manual_seed(before), torch.Generator()
    generator.set_state(jump.advance(generator.get_state(), 0))
    torch.empty(before).uniform_(generator=generator)
    for count in (1, 624, 1501, 20_000, 2_000_003):
        state = generator.get_state()
        torch.empty(count).uniform_(generator=generator)
        assert torch.equal(jump.advance(state, count), generator.get_state())
        other.set_state(jump.advance(state, count))
        assert torch.equal(torch.rand(700, generator=other), torch.rand(700, generator=generator))


def test_jumps_add_up_where_nobody_can_draw(often):
    state = torch.Generator().manual_seed(7).get_state()
    once = jump.advance(state, 10**12 + 5)
    twice = jump.advance(jump.advance(state, 10**12 - 10**6), 10**6 + 5)
    assert torch.equal(once, twice) and not torch.equal(once, state)


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError):
        jump.advance(torch.Generator().get_state()[:-8], 1)


@pytest.mark.parametrize(("mixer", "tied"), [*((mixer, False) for mixer in MIXERS), ("gated_deltanet", True)])
def test_weights_of_models(often, mixer, tied):
    torch.manual_seed(3)
    expected = LrnnForCausalLM(config(mixer=mixer, tie_word_embeddings=tied))
    state = torch.get_rng_state()
    for fill in (True, False):
        model = build_model(config(mixer=mixer, tie_word_embeddings=tied), 3, False, fill)
        assert torch.equal(torch.get_rng_state(), state)
        if fill:
            pairs = zip(expected.named_parameters(), model.named_parameters(), strict=True)
            assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_no_fill_is_computed_that_is_overwritten(runs):
    model = build_model(config(mixer="gated_deltanet"), 0, False)
    drawn = [p.numel() for name, p in model.named_parameters() if "norm" not in name]
    assert sorted(runs) == sorted(drawn)


def test_nothing_is_filled_that_will_be_loaded(runs):
    build_model(config(mixer="attention"), 0, False, fill=False)
    assert runs == []


def both(action):
    """Return what `action` returns with and without LazyFills, and the random numbers after it."""
    results = []
    for lazy in (False, True):
        torch.manual_seed(11)
        if lazy:
            with LazyFills():
                out = action()
        else:
            out = action()
        results.append([*out, torch.rand(3)])
    return zip(*results, strict=True)


def test_fills_that_are_read_or_changed_or_mixed_with_others(often):
    def action():
        linear = nn.Linear(33, 41)
        read = linear.weight.detach().sum()
        few, odd = torch.empty(7).normal_(), torch.empty(1000, 3).normal_(1.0, 2.0)
        half = torch.empty(40).normal_()
        half[:20].uniform_(2, 3)
        integers = torch.randint(0, 9, (5,))
        other = torch.empty(30, dtype=torch.float64).uniform_()
        own = torch.empty(50).normal_(generator=torch.Generator().manual_seed(1))
        column = torch.zeros(20, 20)
        column[:, 3].normal_()
        twice = torch.empty(100).normal_()
        copy = twice.clone()
        return read, linear.weight, linear.bias, few, odd, half, integers, other, own, column, twice.uniform_(), copy

    for expected, found in both(action):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_an_error(monkeypatch, value):
    def spoil(self, module):
        if isinstance(module, nn.Embedding):
            module.weight[5, 3] = value

    monkeypatch.setattr(LrnnForCausalLM, "_init_weights", spoil)
    monkeypatch.setattr("lrnn.model.modeling_lrnn.LrnnModel._init_weights", spoil)
    with pytest.raises(RuntimeError, match=r"model\.embeddings\.weight is not finite"):
        build_model(config(), 0, False)


def test_a_checkpoint_that_lacks_a_weight_is_refused(monkeypatch, tmp_path):
    model = build_model(config(), 0, False, fill=False)
    names = dict(model.named_parameters())
    tensors = {f"param:{name}:0": torch.zeros(p.numel()) for name, p in names.items()}
    state = SavedState.__new__(SavedState)
    state.folder, state._files, state._index = tmp_path, {"f": Tensors(tensors)}, {}
    for key, tensor in tensors.items():
        kind, name, _ = key.split(":")
        state._index[kind, name] = [(0, tensor.numel(), "f", key)]
    state.load_into(model)
    assert all((p == 0).all() for p in names.values())
    name = "model.layers.1.mlp.up_proj.weight"
    (entry,) = state._index["param", name]
    state._index["param", name] = [(0, entry[1] - 1, *entry[2:])]
    with pytest.raises(BrokenCheckpoint, match=f"lacks 1 of .* elements of param {name}"):
        state.load_into(model)
    del state._index["param", name]
    with pytest.raises(BrokenCheckpoint, match=f"do not share the parameter {name}"):
        state.load_into(model)


class Tensors(dict):
    """Stands for a file of tensors."""

    get_slice = dict.__getitem__
