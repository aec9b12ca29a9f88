"""Test scaled rotary positions against those of transformers, and the mappings that are refused."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.formats.fla import not_in_fla
from lrnn.model.positions import turns
from lrnn.model.rope_scaling import scaled_frequencies
from lrnn.model_config import check_changes_count

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
LLAMA = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA |= {"original_max_position_embeddings": 512}
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 1},
    YARN,
    YARN | {"attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2.5},
    YARN | {"factor": 1.0, "mscale": 0.7},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    YARN | {"original_max_position_embeddings": 6},  # every channel turns slowly
    YARN | {"original_max_position_embeddings": 10**7},  # every channel turns fast
    LLAMA,
    LLAMA | {"factor": 32.0, "low_freq_factor": 0.5, "high_freq_factor": 9},
]


@pytest.mark.parametrize(("size", "base"), [(64, 10_000.0), (16, 500_000)])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_angles_are_those_of_transformers(scaling, size, base):
    config = LlamaConfig(head_dim=size, max_position_embeddings=4096, rope_parameters={**scaling, "rope_theta": base})
    truth, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    found, ours = scaled_frequencies(size, base, scaling, torch.device("cpu"))
    assert ours == pytest.approx(factor, rel=1e-15)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    position = torch.arange(5)[None] * 100
    cos, sin = turns(position, size, base, scaling)
    angle = position[..., None, None] * truth
    torch.testing.assert_close(cos, angle.cos() * factor, rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angle.sin() * factor, rtol=0, atol=1e-4)


ONE_OF = "rope_scaling must be null or a mapping whose rope_type is 'linear' or 'yarn' or 'llama3'"
REFUSED = {
    "a text": ("yarn", f"{ONE_OF}; got 'yarn'"),
    "the old key": ({"type": "linear", "factor": 2}, f"{ONE_OF}; got {{'type': 'linear', 'factor': 2}}"),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        f"{ONE_OF} (the angles of 'dynamic' change with the length of the text); got",
    ),
    "an unknown type": ({"rope_type": "longrope", "factor": 2.0}, f"{ONE_OF}; got"),
    "a list": ({"rope_type": ["yarn"]}, f"{ONE_OF}; got"),
    "a missing key": (
        {"rope_type": "yarn", "factor": 2.0},
        "rope_scaling of type 'yarn' needs factor, original_max_position_embeddings, but has no "
        "original_max_position_embeddings; got",
    ),
    "an unknown key": (YARN | {"beta": 1}, "rope_scaling of type 'yarn' has no key 'beta'; it has factor, "),
    "a small factor": (YARN | {"factor": 0.5}, "rope_scaling.factor must be a number of at least 1; got 0.5"),
    "true": (YARN | {"factor": True}, "rope_scaling.factor must be a number of at least 1; got True"),
    "not a number": (YARN | {"factor": float("nan")}, "rope_scaling.factor must be a number of at least 1; got nan"),
    "half a token": (
        LLAMA | {"original_max_position_embeddings": 8.5},
        "rope_scaling.original_max_position_embeddings must be a positive integer; got 8.5",
    ),
    "no wavelengths between": (
        LLAMA | {"high_freq_factor": 1.0},
        "rope_scaling.low_freq_factor must be below high_freq_factor; got 1.0 and 1.0",
    ),
    "a number for a flag": (YARN | {"truncate": 0}, "rope_scaling.truncate must be true or false; got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    value, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        LrnnConfig(mixer="attention", rope_scaling=value)
    assert str(error.value).startswith(message)


def test_scaling_without_positions_is_refused_unless_some_layer_has_them():
    with pytest.raises(ValueError, match=r"rope_scaling = .* has no effect, because rope_theta is null"):
        LrnnConfig(mixer="attention", rope_theta=None, rope_scaling=YARN)
    pattern = ["gla", "attention", {"mixer": "attention", "rope_theta": None}]
    config = LrnnConfig(mixer=pattern, num_hidden_layers=3, rope_scaling=YARN)
    assert [config.layer(i).rope_scaling for i in (1, 2)] == [YARN, YARN]
    with pytest.raises(ValueError, match=r"rope_scaling = .* is for the mixers attention, not for gla"):
        LrnnConfig(mixer="gla", rope_scaling=YARN)


def test_the_mapping_is_saved_and_fla_does_not_have_it(tmp_path):
    config = LrnnConfig(mixer=["gated_deltanet", "attention"], num_hidden_layers=2, rope_scaling=LLAMA)
    config.save_pretrained(tmp_path)
    assert LrnnConfig.from_pretrained(tmp_path).rope_scaling == LLAMA
    assert not_in_fla(config) == f"rope_scaling {LLAMA!r} of layer 1, where fla has none"
    plain = LrnnConfig(mixer="attention")
    assert "rope_scaling" not in plain.to_dict() and not hasattr(plain, "rope_parameters")


def test_a_change_that_no_layer_takes_is_refused():
    entry = {"mixer": "attention", "rope_theta": 500.0}
    config = LrnnConfig(mixer=["gla", entry], num_hidden_layers=2, rope_theta=None, sliding_window=8)
    check_changes_count(config, ["base", "sliding_window", "num_heads", "hidden_size"])
    with pytest.raises(UserError) as error:
        check_changes_count(config, ["rope_theta"])
    assert str(error.value) == (
        "model.rope_theta = None has no effect: in the model's mixer every layer that reads it, attention, has its own "
        "value, 500.0; change it there"
    )
    config = LrnnConfig(mixer=["gla", entry, "attention"], num_hidden_layers=3, rope_theta=None)
    check_changes_count(config, ["rope_theta"])
