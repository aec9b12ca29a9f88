"""Fixtures: the real benchmark data, a tiny random model with its tokenizer, held-out files, a SentencePiece model."""

import json
import shutil
import sysconfig
from hashlib import sha256
from pathlib import Path

import pytest
import tqdm
from tiny_models import write_tiny_model

from lrnn.eval.commonsense import wheel
from lrnn.eval.suites import fetch_data
from lrnn.tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def eval_data():
    """Return the folder of the real benchmark data, fetched into the cache if it is missing."""
    return fetch_data.fetch()


def first_rows(eval_data, folder, names, rows):
    """Copy the data into a folder, but only the first rows of some files."""
    folder = shutil.copytree(eval_data, folder)
    manifest = json.loads((folder / fetch_data.MANIFEST).read_text())
    for name in (f"{name}.jsonl" for name in names):
        kept = (folder / name).read_bytes().splitlines(keepends=True)[:rows]
        (folder / name).write_bytes(b"".join(kept))
        manifest["files"][name] |= {"rows": len(kept), "sha256": sha256(b"".join(kept)).hexdigest()}
    (folder / fetch_data.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def less_eval_data(eval_data, tmp_path_factory):
    """Return a folder with the data, but only the first documents of the two largest sets, GSM8K and MATH.

    lm-eval prepares all documents of a task, which takes seconds, even if few are evaluated.
    """
    return first_rows(eval_data, tmp_path_factory.mktemp("data") / "eval_data", ("gsm8k", "math"), 70)


@pytest.fixture(scope="session")
def few_commonsense_rows(eval_data, tmp_path_factory):
    """Return a folder with the data, but only the first 8 documents of every task of common sense."""
    return first_rows(eval_data, tmp_path_factory.mktemp("data") / "eval_data", wheel.ROWS, 8)


@pytest.fixture
def few_documents(less_eval_data, monkeypatch):
    """Let tasks read `less_eval_data`."""
    monkeypatch.setenv("LRNN_EVAL_DATA", str(less_eval_data))


BAR = {name: getattr(tqdm.tqdm, name) for name in ("__init__", "display", "close", "clear")}


@pytest.fixture(autouse=True)
def bars(monkeypatch):
    """Draw bars as usual in every test. An evaluation changes them for its process."""
    for name, method in BAR.items():
        monkeypatch.setattr(tqdm.tqdm, name, method)


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


@pytest.fixture(scope="session")
def heldout(tmp_path_factory):
    """Return a held-out file of three short documents."""
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    texts = ["def f(x):\n    return x\n", "[1, 2]", "naïve\n"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def heldout_file(tmp_path):
    path = tmp_path / "heldout.jsonl"
    # One text looks like a list, one has a trailing newline, one is not ASCII, and one is empty.
    texts = ["[1, 2]", "def f(x):\n    return x\n", "\u00e4\u2028x", ""]
    path.write_text("".join(json.dumps({"text": text, "source": "a"}) + "\n" for text in texts))
    return path
