"""A ladder of two sizes and three arms, as the YAML file has it. Nothing in it is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "vocab_size": 512}


@pytest.fixture
def written() -> dict[str, Any]:
    """The content of the file, which tests change."""
    return {
        "out": "out",
        "reference": "delta",
        "run": {
            "data": {"seq_len": 32, "corpora": [{"path": "corpora/code", "weight": 0.75}, {"path": "corpora/prose"}]},
            "optim": {"betas": [0.9, 0.99]},
            "schedule": {"name": "wsd", "min_lr_ratio": 0.0},
            "global_batch_size": 4,
            "micro_batch_size": 4,
        },
        "warmup": 0.1,
        "decay": 0.25,
        "sizes": {
            "small": {"model": SMALL | {"intermediate_size": 96}, "tokens": [5_000], "lr": 1e-3, "at_once": 2},
            "large": {
                "model": SMALL | {"intermediate_size": 128},
                "tokens": [10_000, 20_000],
                "lr": 5e-4,
                "run": {"global_batch_size": 8, "optim": {"weight_decay": 0.2}},
            },
        },
        "arms": {
            "delta": {"title": "gated DeltaNet", "model": {"mixer": "gated_deltanet"}},
            "hybrid": {
                "model": {"mixer": ["gated_deltanet", "attention"]},
                "sizes": {"large": {"intermediate_size": 160}},
                "run": {"optim": {"eps": 1e-6, "weight_decay": 0.3}},
            },
            "attention": {"model": {"mixer": "attention"}},
        },
        "grids": [{"sizes": ["small"], "arms": ["delta", "attention"], "seeds": [0, 1]}],
    }


@pytest.fixture
def write(tmp_path, written):
    """`write()` writes the content to a file and returns its path."""

    def write() -> Path:
        path = tmp_path / "ladder.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return write
