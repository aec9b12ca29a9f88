"""`tests/benchmarks/ladder_speed.py` without a GPU: the runs that it makes of a ladder, a step without DeepSpeed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import ladder_speed

from lrnn.ladder.cells import load_ladder
from lrnn.pretrain.config import load_config, parse_config


def test_the_whole_batch_is_one_micro_batch():
    """What is measured of a size has its model and batch, and none of what takes time beside training."""
    _, cells = load_ladder("ranges")
    for cell in {cell.size: cell for cell in cells}.values():
        changes = {"precision": "bfloat16", "fused_layers": True}
        raw = ladder_speed.config_of(cell.config, Path("corpus"), Path("run"), 60, changes)
        config = parse_config(raw, "test")
        assert config.micro_batch_size == config.global_batch_size == cell.config.global_batch_size
        assert config.model == cell.config.model and config.optim == cell.config.optim
        assert [source.path for source in config.data.corpora] == ["corpus"] and config.data.seq_len == 2048
        assert (config.steps, config.log.heldout_every, config.log.every, config.zero) == (60, 0, 5, 1)


def test_a_step_without_deepspeed_learns():
    """Each call is a step of AdamW: after a few of them, the loss of the same tokens is lower."""
    sizes = ["vocab_size=300", "hidden_size=32", "num_heads=2", "head_dim=16", "intermediate_size=48"]
    config = load_config("tiny", [*(f"model.{x}" for x in sizes), "global_batch_size=2", "micro_batch_size=2",
                                  "data.seq_len=32", "optim.lr=0.01"])  # fmt: skip
    step, model = ladder_speed.step_alone(config, torch.device("cpu"))
    losses = []
    model.register_forward_hook(lambda module, inputs, output: losses.append(float(output.loss)))
    for _ in range(4):
        step()
    assert losses[3] < losses[1] < losses[0] and losses[0] == pytest.approx(5.7, abs=0.2)  # ln 300
    assert all(p.grad is None for p in model.parameters())
