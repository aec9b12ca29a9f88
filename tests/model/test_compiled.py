"""Test `torch.compile` of the whole model.

LRNN_TORTURE=1 compiles forward and backward passes with Inductor (`make torture`), which takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrnn import LrnnConfig, LrnnForCausalLM
from lrnn.model.inputs import read_layout

SUPPORT = Path(__file__).parents[1] / "support"


def test_a_mask_fits_tokens_whose_number_is_symbolic():
    """The number is, after calls of two lengths. A mask that comes then has a fixed length."""

    def mask_of(x, mask=None):
        return x, read_layout(x.shape, 0, mask, None, None, {}).mask

    compiled = torch.compile(mask_of, backend="eager", fullgraph=True)
    compiled(torch.zeros(2, 9))
    compiled(torch.zeros(2, 14))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    assert torch.equal(compiled(torch.zeros(2, 9), mask)[1], mask == 1)


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="long: LRNN_TORTURE=1 (make torture)")
@pytest.mark.parametrize("packages", [["lrnn"], []])
def test_inductor_gives_the_losses_and_gradients_of_the_model(packages, tmp_path):
    """With lrnn's code, and with the code of the folder in a process without lrnn."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32, "intermediate_size": 96}
    LrnnForCausalLM(LrnnConfig(vocab_size=640, **size)).save_pretrained(tmp_path / "model")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", SUPPORT / "compile_model.py", tmp_path / "model", *packages]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT ")[2])
    assert found["class"].startswith("lrnn." if packages else "transformers_modules.")
    assert found["graphs"] == 2  # with and without a mask
    assert max(found["errors"].values()) < 1e-4, found["errors"]
