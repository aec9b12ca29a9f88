"""Fixtures: the real benchmark data, a tiny random model with its tokenizer, a held-out file, a SentencePiece model."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from lrnn.eval.suites import fetch_data
from lrnn.tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def eval_data():
    """Return the folder of the real benchmark data, fetched into the cache if it is missing."""
    return fetch_data.fetch()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return the folder of a random two-layer Llama with a byte-level tokenizer, in the form of an export."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"] * 3, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "left"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=2048, **size)
    config.bos_token_id, config.eos_token_id = 0, 1
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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
