"""Fixtures: small corpora, and runs on them."""

import json
import random
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lrnn.cli import main

WORDS = ["def", "return", "self", "for", "in", "if", "else", "import", "print", "value", "index", "0", "1", "42", "=="]
WORDS += ["+=", "#", "é", "日本", "🎉", "<s>", "</s>", "{}", "[]", ":", "\n", "\n   ", "\t"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test off the hub. `datasets` would ask it, to count its loads, and wait for a name server in vain."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for child processes
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "HF_HUB_OFFLINE", True)


def random_text(rng: random.Random, words: int) -> str:
    """Return text with newlines, indentation, several scripts and special tokens; not empty for words > 0."""
    return "x" + " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 60 text files of 1 to 400 words in nested folders."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(60):
        path = root / f"d{i % 3}" / f"file{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random_text(rng, rng.randint(1, 400)).encode())
    return root


@pytest.fixture(scope="session")
def sentencepiece_model(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SentencePiece model of 300 pieces with bos 1 and eos 2, trained with the library's own defaults."""
    import sentencepiece

    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(p.read_text() for p in sorted(text_folder.rglob("*.txt"))),
        model_prefix=str(path.with_suffix("")),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path


@pytest.fixture
def build_corpus(sentencepiece_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """`build_corpus(source, *options, out="corpus")` runs `lrnn corpus` in this process and returns the folder."""

    def build(source: Path | str, *options: str, out: str = "corpus") -> Path:
        arguments = [str(source), "--out", str(tmp_path / out), "--processes", "1"]
        if not {"--tokenizer", "--train-tokenizer"} & set(options):
            arguments += ["--tokenizer", str(sentencepiece_model)]
        assert main(["corpus", *arguments, *options]) == 0  # The last of repeated options counts.
        return tmp_path / out

    return build


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Return two small corpora of the standard library's source with one tokenizer, written by the command line."""
    root = tmp_path_factory.mktemp("corpora")
    stdlib = sysconfig.get_paths()["stdlib"]
    common = ["corpus", stdlib, "--skip-bad-files", "--processes", "1", "--heldout", "0.2"]
    assert main([*common, "--include", "json/*.py", "--train-tokenizer", "400", "--out", str(root / "a")]) == 0
    tokenizer = str(root / "a" / "tokenizer")
    assert main([*common, "--include", "email/*.py", "--tokenizer", tokenizer, "--out", str(root / "b")]) == 0
    return root


@pytest.fixture(scope="session")
def model_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(
        json.dumps({
            "model_type": "lrnn", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2,
            "head_dim": 16, "intermediate_size": 48,
        })
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def hybrid_json(tmp_path_factory, model_json):
    """Return the file of a model of gated DeltaNet and attention, which has keys and heads of its own."""
    path = tmp_path_factory.mktemp("hybrid") / "config.json"
    attention = {"mixer": "attention", "num_heads": 4, "head_dim": 8, "num_kv_heads": 2, "sliding_window": 40}
    fields = {"num_hidden_layers": 2, "mixer": ["gated_deltanet", attention]}
    path.write_text(json.dumps(json.loads(model_json.read_text()) | fields))
    return path


@pytest.fixture(scope="session")
def config_in(corpora, model_json):
    """`config_in(folder)` returns a copy of the configuration of a run in `folder/run`, which may be changed."""

    def make(folder, run="run", stage=2, **changes):
        config = {
            "run_dir": str(folder / run),
            "model": str(model_json),
            "zero": stage,
            "precision": "float32",  # many CPUs compute bfloat16 many times as slowly
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "data": {
                "seq_len": 64,
                "reset_at_document_boundaries": True,
                "corpora": [
                    {"path": str(corpora / "a"), "weight": 1.0},
                    {"path": str(corpora / "b"), "weight": 2.0},
                ],
            },
            "optim": {"lr": 0.01, "weight_decay": 0.1},
            "schedule": {"warmup_steps": 2},
            "checkpoint": {"every": 100, "keep_last": 10},
            "log": {"every": 1, "heldout_every": 3, "heldout_batches": 4, "tensorboard": False},
        }
        return {**config, **changes}

    return make


@pytest.fixture
def base(config_in, tmp_path):
    """Return `config_in` for this test's own folder."""
    return partial(config_in, tmp_path)
