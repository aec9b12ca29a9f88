"""Patterns of mixers: which layer has what, what is written, and what is refused."""

import copy
import importlib
import json
import re

import pytest
import torch
from mixer_models import SIZE, tokens

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.model import mixers
from lrnn.model.mixers import MIXERS
from lrnn.model_config import model_config_from

ATTENTION = {"mixer": "attention", "num_heads": 1, "head_dim": 8}
PATTERN = ["gated_deltanet", "mamba", ATTENTION]


def config(mixer, layers: int = 5, **fields) -> LrnnConfig:
    return LrnnConfig(**{**SIZE, "num_hidden_layers": layers, "mixer": mixer, **fields})


def test_the_order_of_mixers_is_that_of_their_files_whichever_was_imported_first():
    order = list(MIXERS)
    MIXERS["attention"] = MIXERS.pop("attention")
    assert list(MIXERS) != order
    importlib.reload(mixers)
    assert list(MIXERS) == order and order == sorted(order, key=lambda name: MIXERS[name].__module__)


def test_a_pattern_is_repeated_over_the_layers():
    hybrid = config(PATTERN)
    assert hybrid.mixers == ("gated_deltanet", "mamba", "attention", "gated_deltanet", "mamba") and hybrid.is_hybrid
    assert [(hybrid.layer(i).num_heads, hybrid.layer(i).head_dim) for i in range(5)] == [
        (2, 16), (2, 16), (1, 8), (2, 16), (2, 16),
    ]  # fmt: skip
    attn = [layer.attn for layer in LrnnForCausalLM(hybrid).model.layers]
    assert [type(mixer) for mixer in attn] == [MIXERS[name] for name in hybrid.mixers]
    assert attn[2].q_proj.weight.shape == (8, 32) and attn[3].q_proj.weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("mixer", "plain"),
    [
        (["gla"], {"mixer": "gla"}),
        (["gla", "gla"], {"mixer": "gla"}),
        (["transformer", "attention"], {"mixer": "attention"}),
        ([ATTENTION], {**ATTENTION, "mixer": "attention"}),
        ([ATTENTION, ATTENTION], {**ATTENTION, "mixer": "attention"}),
    ],
)
def test_a_pattern_of_equal_entries_is_a_plain_model(mixer, plain):
    given = copy.deepcopy(mixer)
    found, expected = config(mixer), config(**plain)
    assert found.to_dict() == expected.to_dict() and not found.is_hybrid and found.layer(4) is found
    assert mixer == given


def test_it_is_written_and_read_back(tmp_path):
    hybrid = config(["transformer", *PATTERN])
    hybrid.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == ["attention", *PATTERN]
    read = LrnnConfig.from_pretrained(tmp_path)
    assert read.mixer == hybrid.mixer and read.mixers == hybrid.mixers
    assert read.layer(3).to_dict() | {"mixer": 0} == hybrid.layer(3).to_dict() | {"mixer": 0}


def test_the_older_name_of_attention_stays():
    """Its spelling is kept, so that config.json and the fingerprints of grids stay as they were."""
    old, new = config("transformer", 2), config("attention", 2)
    assert old.mixer == "transformer" and old.mixers == new.mixers == ("attention", "attention")
    torch.manual_seed(0)
    model = LrnnForCausalLM(new).eval()
    same = LrnnForCausalLM(old).eval()
    same.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens(2, 9)).logits, same(tokens(2, 9)).logits)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ([], "mixer is an empty list"),
        (["gla"] * 6, "mixer is a pattern of 6 layers, but num_hidden_layers is only 5"),
        (["gla", "lstm"], f"mixer[1] 'lstm' is not one of {', '.join(MIXERS)}"),
        (["gla", {"mixer": "lstm"}], "mixer[1] 'lstm' is not one of "),
        (["gla", 3], "mixer[1] must be a name, or an object with one"),
        (["gla", {"num_heads": 3}], "mixer[1] must be a name, or an object with one"),
        ({"mixer": "gla"}, "mixer must be a name, or a list with one entry per layer"),
        (None, "mixer must be a name, or a list"),
        ([{"mixer": "attention", "state_size": 3}], "mixer[0]: state_size is not an option of attention, which has"),
        (["gla", ATTENTION | {"allow_neg_eigval": True}], "mixer[1]: allow_neg_eigval is not an option of attention"),
        (["gla", ATTENTION | {"hidden_size": 64}], "mixer[1]: hidden_size is not an option of attention"),
        (["gla", ATTENTION | {"head_dim": 7}], "mixer[1], attention: head_dim"),
        (["gla", ATTENTION | {"num_heads": 0}], "mixer[1], attention: num_heads must be a positive integer; got 0"),
        (["gla", {"mixer": "deltaproduct", "num_householder": 5}], "mixer[1], deltaproduct: num_householder must be"),
        (["gla", ATTENTION | {"num_heads": "8"}], "mixer[1].num_heads = '8' should be int"),
        (["gla", {"mixer": "gla", "allow_neg_eigval": "false"}], "mixer[1].allow_neg_eigval = 'false' should be bool"),
    ],
)  # fmt: skip
def test_bad_patterns_are_refused(mixer, message):
    with pytest.raises(UserError, match=f"^the file: {re.escape(message)}") as error:
        model_config_from({**SIZE, "num_hidden_layers": 5, "mixer": mixer}, "the file")
    assert "\n" not in str(error.value)


class Recording:
    """A configuration that notes which fields are read."""

    def __init__(self, wrapped):
        self.wrapped, self.read = wrapped, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.wrapped, name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_options_are_the_fields_that_a_mixer_reads(mixer):
    recording, options = Recording(config(mixer)), MIXERS[mixer].options
    MIXERS[mixer](recording, 0)
    MIXERS[mixer].cost(recording)
    of_stack = {"hidden_size", "num_hidden_layers", "norm_eps", "max_position_embeddings"}
    inherited = {"allow_neg_eigval", "num_heads", "head_dim"}  # `Mixer` itself reads these
    assert recording.read - of_stack - (inherited - set(options)) == set(options)
