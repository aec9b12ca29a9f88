"""Runs on a GPU: a corpus, and configurations of a small model with heads of 128.

LRNN_REHEARSE=1 runs these tests where there is no GPU, on smaller models and in float32.
"""

import sysconfig

import pytest
from gpu_runs import MODEL, ON_GPU, VOCABULARY

from lrnn.cli import main


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Return a corpus of the standard library's source."""
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    files = "*.py" if ON_GPU else "json/*.py"
    command = ["corpus", sysconfig.get_paths()["stdlib"], "--include", files, "--skip-bad-files", "--heldout", "0.1"]
    assert main([*command, "--train-tokenizer", str(VOCABULARY), "--out", str(out)]) == 0
    return out


@pytest.fixture
def base(corpus, tmp_path):
    """`base(name, **changes)` returns the configuration of a run, by default in bfloat16 with fused layers."""

    def make(name, **changes):
        config = {
            "run_dir": str(tmp_path / name),
            "model": dict(MODEL),
            "zero": 1,
            "precision": "bfloat16" if ON_GPU else "float32",
            "steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "data": {
                "seq_len": 512 if ON_GPU else 64,
                "reset_at_document_boundaries": False,
                "corpora": [{"path": str(corpus)}],
            },
            "optim": {"lr": 0.003, "weight_decay": 0.1},
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"every": 100},
            "log": {"every": 1, "heldout_every": 4, "heldout_batches": 4, "tensorboard": False},
        }
        return {**config, **changes}

    return make
