"""Models and documents that the tests of `lrnn position` read."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from lrnn import LrnnConfig, LrnnForCausalLM

TRAINED = 32  # the training length of the models in tokens
WORDS = ["def", "f(x):\n   ", "return", "x\n", "for", "i", "in", "range(9):", "print(i)\n", "über", "日本", ""]


def make_model(tiny_model: Path, folder: Path, *, negative: bool = True, seed: int = 0) -> Path:
    """Return the folder of a random model with the tokenizer of `tiny_model`."""
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    config = LrnnConfig(
        vocab_size=300,
        max_position_embeddings=TRAINED,
        allow_neg_eigval=negative,
        bos_token_id=0,
        eos_token_id=1,
        **size,
    )
    LrnnForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


def text_of(words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=words))


def write_texts(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"text": text, "source": "a"}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_heldout(path: Path) -> Path:
    """Write four short documents, an empty one, and three of more than 16 times the training length."""
    words = [5, 400, 9, 300, 0, 12, 350, 7]
    return write_texts(path, [text_of(n, seed) for seed, n in enumerate(words)])
