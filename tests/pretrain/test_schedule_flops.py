"""Compare the learning rate with closed forms, and the FLOP formula with a count over the model's own modules."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.layers import Mixer, ShortConvolution
from lrnn.model.mixers import MIXERS
from lrnn.model_config import load_model_config
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.metrics.flops import peak_flops, train_flops_per_token
from lrnn.pretrain.schedule import learning_rate

ROOT = Path(__file__).parents[2]


def rates(steps: int, lr: float = 0.5, **schedule) -> list[float]:
    """Return the learning rate of every step of a run."""
    raw = {
        "run_dir": "x", "model": "x", "steps": steps, "global_batch_size": 1, "micro_batch_size": 1,
        "data": {"seq_len": 1, "corpora": [{"path": "x"}]}, "optim": {"lr": lr}, "schedule": schedule,
    }  # fmt: skip
    config = parse_config(raw, "test")
    return [learning_rate(step, config) for step in range(steps)]


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_warm_up_is_a_line_from_zero(name):
    found = rates(100, name=name, warmup_steps=8)
    assert found[:8] == pytest.approx([0.5 / 8, 1 / 8, 1.5 / 8, 0.25, 2.5 / 8, 3 / 8, 3.5 / 8, 0.5])
    assert found[8] == pytest.approx(0.5)
    assert rates(100, name=name)[0] == 0.5  # without a warm-up, the first step is at the peak


def test_cosine():
    """Of 101 steps after a warm-up of 20, the first is at the peak, the middle half-way, the last at the minimum."""
    found = rates(121, name="cosine", warmup_steps=20, min_lr_ratio=0.2)
    assert found[20] == pytest.approx(0.5) and found[70] == pytest.approx(0.3) and found[120] == pytest.approx(0.1)
    # cos(pi/3) and cos(2 pi/3) are 1/2 and -1/2.
    found = rates(111, name="cosine", warmup_steps=20, min_lr_ratio=0.0)
    assert found[50] == pytest.approx(0.5 * 0.75) and found[80] == pytest.approx(0.5 * 0.25)
    assert found[110] == pytest.approx(0, abs=1e-15)
    # The slope of cosine is steepest in the middle: pi/2 times that of the straight line.
    step = max(a - b for a, b in pairwise(found[20:]))
    assert step == pytest.approx(0.5 / 90 * math.pi / 2, rel=1e-3)
    assert all(a > b for a, b in pairwise(found[20:]))


def test_wsd():
    """After the plateau, the rate follows a line that would reach the minimum one step after the last."""
    found = rates(100, name="wsd", warmup_steps=10, decay_steps=19, min_lr_ratio=0.2)
    assert found[9:81] == [0.5] * 72
    line = [0.5 - 0.4 * k / 20 for k in range(20)]
    assert found[80:] == pytest.approx(line) and found[-1] == pytest.approx(0.12)
    assert rates(50, name="wsd", warmup_steps=5)[5:] == [0.5] * 45  # no decay at all


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "wsd", "decay_steps": 200}])
def test_no_jumps(schedule):
    found = rates(1000, warmup_steps=100, min_lr_ratio=0.1, **schedule)
    assert max(abs(a - b) for a, b in pairwise(found)) <= 0.5 / 100 + 1e-12
    assert min(found[100:]) >= 0.05 - 1e-12 and max(found) == 0.5


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "wsd", "decay_steps": 1}])
def test_short_runs(schedule):
    assert rates(1, warmup_steps=0, **schedule)[0] > 0
    assert rates(2, warmup_steps=1, **schedule)[0] == 0.5
    assert rates(3, warmup_steps=1, **schedule)[1] == 0.5


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def recurrence_of_a_head(config: LrnnConfig) -> int:
    """Return the multiply-adds per token and (value) head, by the equations in the mixers' docstrings."""
    D, N, n = config.head_dim, config.state_size, config.num_householder
    if config.mixer in ("attention", "transformer"):
        T = config.max_position_embeddings
        seen = sum(min(t, config.sliding_window or T) for t in range(1, T + 1))
        return 2 * D * seen // T  # a score and a sum, on average
    read = write = D * (config.head_v_dim or D)
    return {
        "gated_deltanet": read + write + read,
        "deltanet": read + write + read,
        "gated_deltaproduct": n * (read + write) + read,
        "deltaproduct": n * (read + write) + read,
        "gla": write + read,
        "mamba2": write + read,
        "mamba": D * N + D * N,  # in each channel of a head, N numbers are written and read
        "mlstm": write + read + 2 * D,  # the normaliser
        "rwkv7": read + write + write + read,  # with kappa; the removal; k v^T; with r
        "slstm": 4 * read,  # h times a matrix for each gate
    }[config.mixer]


def counted_flops(config: LrnnConfig) -> float:
    """Return the forward and backward FLOPs of one token, counted over the modules that exist."""
    with torch.device("meta"):
        model = LrnnForCausalLM(config)
    multiply_adds = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            multiply_adds += module.in_features * module.out_features
        elif isinstance(module, ShortConvolution):
            channels, _, taps = module.weight.shape
            multiply_adds += channels * taps
        elif isinstance(module, Mixer):
            layer = config.layer(module.layer_idx)
            multiply_adds += (layer.num_value_heads or layer.num_heads) * recurrence_of_a_head(layer)
    return 3 * 2 * multiply_adds


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(vocab_size=97, hidden_size=24, num_hidden_layers=3, num_heads=5, head_dim=6, intermediate_size=31),
        dict(
            vocab_size=11, hidden_size=40, num_hidden_layers=1, num_heads=2, head_dim=16, conv_size=3, num_householder=3
        ),
    ],
)
def test_flops(mixer, sizes):
    config = LrnnConfig(mixer=mixer, **sizes)
    assert train_flops_per_token(config) == counted_flops(config)


def test_flops_of_a_hybrid():
    """Five layers of a pattern of three, each with its own heads, against models that have one of them five times."""
    sizes = dict(vocab_size=11, hidden_size=40, num_hidden_layers=5, head_dim=16, intermediate_size=31)
    entries = [{"mixer": "gla", "num_heads": 3}, {"mixer": "mamba", "conv_size": 3}, {"mixer": "attention"}]
    plain = [counted_flops(LrnnConfig(**{**sizes, **entry})) for entry in entries]
    head = 6 * 11 * 40
    expected = (2 * (plain[0] - head) + 2 * (plain[1] - head) + plain[2] - head) / 5 + head
    assert train_flops_per_token(LrnnConfig(mixer=entries, **sizes)) == pytest.approx(expected)


@pytest.mark.parametrize("window", [None, 1, 511, 512, 4096])
def test_flops_of_attention_with_options(window):
    sizes = dict(vocab_size=11, hidden_size=40, num_hidden_layers=1, num_heads=4, head_dim=16, intermediate_size=31)
    config = LrnnConfig(mixer="attention", **sizes, num_kv_heads=2, sliding_window=window, attention_gate=True)
    assert abs(train_flops_per_token(config) - counted_flops(config)) <= 3 * 2 * config.num_heads


@pytest.mark.parametrize("mixer", ["gated_deltanet", "deltanet", "gated_deltaproduct", "deltaproduct"])
def test_flops_of_key_and_value_heads_of_different_numbers_and_sizes(mixer):
    sizes = {"num_heads": 2, "num_value_heads": 6, "head_dim": 12, "head_v_dim": 20, "num_householder": 3}
    config = LrnnConfig(mixer=mixer, vocab_size=97, hidden_size=24, num_hidden_layers=3, intermediate_size=31, **sizes)
    assert train_flops_per_token(config) == counted_flops(config)
    assert MIXERS[mixer].cost(config).state == 6 * 12 * 20


@pytest.mark.parametrize("name", ["tiny", "340m", "1.3b", "340m-hybrid", "1.3b-hybrid", "7b-hybrid"])
def test_flops_of_the_shipped_models(name):
    config = load_model_config(ROOT / "configs" / "models" / f"{name}.json")
    assert train_flops_per_token(config) == counted_flops(config)
    with torch.device("meta"):
        parameters = LrnnForCausalLM(config).num_parameters()
    assert name != "7b-hybrid" or parameters == 7_430_870_688  # those of Olmo Hybrid 7B in transformers
    # The rule of thumb, 6 x parameters, differs by the embedding and the state.
    assert 0.75 < train_flops_per_token(config) / (6 * parameters) < 1.1


def test_a_tied_head_counts_as_a_head():
    tied, untied = (LrnnConfig(vocab_size=50, num_hidden_layers=1, tie_word_embeddings=t) for t in (True, False))
    assert train_flops_per_token(tied) == train_flops_per_token(untied)


def test_peak_flops():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA B200") == 2250e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a slice of the GPU
