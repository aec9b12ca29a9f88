"""Test that rooms at the top of the repository do not shadow packages of the same name, and that all tests are run."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("room", ["kernels", "pretrain", "eval"])
def test_rooms_are_plain_folders_behind_links(room):
    """transformers imports Hugging Face's package `kernels`; a regular package of that name here would hide it."""
    assert (REPOSITORY / room).is_dir()
    assert not (REPOSITORY / room / "__init__.py").exists()
    assert (REPOSITORY / "lrnn" / room).resolve() == REPOSITORY / room


def test_transformers_works_at_the_root_of_the_repository():
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "import lrnn, lrnn.kernels.reference.delta_rule\n"
        "size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)\n"
        "print(LlamaForCausalLM(LlamaConfig(**size)).num_parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
