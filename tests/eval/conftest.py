"""Fixtures: the real benchmark data, a tiny random model with its tokenizer, a held-out file, a SentencePiece model."""

import json
import sysconfig
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from lrnn.eval.suites import fetch_data
from lrnn.tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def eval_data():
    """Return the folder of the real benchmark data, fetched into the cache if it is missing."""
    return fetch_data.fetch()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return the folder of a random two-layer Llama with a byte-level tokenizer, in the form of an export."""
    return write_tiny_model(tmp_path_factory.mktemp("model"), ["def f(x):\n    return x\n"] * 3)


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / name).read_text() for name in ("argparse.py", "textwrap.py", "typing.py")]
    train_sentencepiece(texts, 600, path)
    return path


@pytest.fixture
def heldout_file(tmp_path):
    path = tmp_path / "heldout.jsonl"
    # One text looks like a list, one has a trailing newline, one is not ASCII, and one is empty.
    texts = ["[1, 2]", "def f(x):\n    return x\n", "\u00e4\u2028x", ""]
    path.write_text("".join(json.dumps({"text": text, "source": "a"}) + "\n" for text in texts))
    return path
