"""Small corpora for the tests of this folder."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lrnn.cli import main

WORDS = ["def", "return", "self", "for", "in", "if", "else", "import", "print", "value", "index", "0", "1", "42", "=="]
WORDS += ["+=", "#", "é", "日本", "🎉", "<s>", "</s>", "{}", "[]", ":", "\n", "\n   ", "\t"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub. (`datasets` would, to count its loads, and wait for a name server where there is none.)"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for processes that are started
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "HF_HUB_OFFLINE", True)


def random_text(rng: random.Random, words: int) -> str:
    """Text with newlines, indentation, several scripts, and special tokens spelled out. Never empty for words > 0."""
    return "x" + " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of text in nested folders, of 1 to 400 words."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(60):
        path = root / f"d{i % 3}" / f"file{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random_text(rng, rng.randint(1, 400)).encode())
    return root


@pytest.fixture(scope="session")
def sentencepiece_model(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 300 pieces with bos 1 and eos 2, trained with the library's own defaults."""
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
        assert main(["corpus", *arguments, *options]) == 0  # of an option given twice the last counts
        return tmp_path / out

    return build
