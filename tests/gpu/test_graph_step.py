"""A training step as one CUDA graph, of `tests/benchmarks/ladder_speed.py`: its weights are those of launched steps."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import ladder_speed

from lrnn.pretrain.config import load_config

MODEL = {"hidden_size": 256, "num_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "intermediate_size": 512}


def test_replays_are_steps():
    options = [f"model.{name}={value}" for name, value in MODEL.items()] + ["precision=bfloat16"]
    config = load_config("tiny", [*options, "micro_batch_size=8", "global_batch_size=8"])
    (launched, truth), (step, model) = (ladder_speed.step_alone(config, torch.device("cuda")) for _ in range(2))
    replay = ladder_speed.captured(step)
    for _ in range(5):
        replay()
    for _ in range(5 + ladder_speed.SETTLING):
        launched()
    found = dict(model.named_parameters())
    errors = {name: float((found[name] - p).norm() / p.norm()) for name, p in truth.named_parameters()}
    print(f"weights differ by at most {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-6, errors
