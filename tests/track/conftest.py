import json

import pytest

from lrnn.track.grid import load_grid

TINY = {
    "tasks": {"parity": {"task": "parity"}},
    "models": {
        "deltanet": {
            "mixer": "deltanet", "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16,
            "conv_size": 1, "intermediate_size": 64,
        }
    },
    "seeds": [0, 1],
    "train": {
        "min_length": 3, "max_length": 10, "steps": 20, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.1,
        "log_every": 4,
    },
    "test": {"min_length": 10, "max_length": 30, "samples": 64, "batch_size": 16},
}  # fmt: skip


@pytest.fixture
def tiny_cells(tmp_path):
    """Return `tiny_cells(folder, **changes)`: the cells of a grid in tmp_path/folder that train in a moment."""

    def make(folder: str = "out", **changes):
        path = tmp_path / f"{folder}.yaml"
        path.write_text(json.dumps({"out": str(tmp_path / folder), **TINY, **changes}))
        return load_grid(path)[1]

    return make
