"""Compare SentencePiece and Hugging Face tokenizers behind one interface with the libraries themselves."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lrnn.errors import UserError
from lrnn.tokenizer import load_tokenizer, train_sentencepiece

TEXTS = ["def f(x):\n    return x\n", "a </s> b <s>", "日本 🎉", " ", "\n\n\t", "x" * 300]


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory) -> Path:
    """Return a byte-level BPE with bos and eos that by default adds a bos, truncates to 16 ids and pads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.enable_truncation(16)
    backend.enable_padding()
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))  # save_pretrained drops truncation and padding
    return folder


def test_sentencepiece(sentencepiece_model, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_model)
    truth = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert tokenizer.encode_batch(TEXTS) == [truth.encode(text) for text in TEXTS]
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece", truth.vocab_size())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode_batch(["some text"])[0]) == "some text"
    assert tokenizer.fingerprint == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.description() == tokenizer.description()
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_huggingface(huggingface_folder, tmp_path):
    tokenizer = load_tokenizer(huggingface_folder)
    truth = AutoTokenizer.from_pretrained(huggingface_folder)
    ids = tokenizer.encode_batch(TEXTS)
    assert ids == [truth(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in TEXTS]
    assert [tokenizer.decode(i) for i in ids] == TEXTS
    every = "".join(map(chr, range(33, 120)))
    plain = AutoTokenizer.from_pretrained(huggingface_folder).backend_tokenizer
    assert len(plain.encode(every).ids) == 16  # the default
    assert tokenizer.decode(tokenizer.encode_batch([every])[0]) == every
    # transformers adds a [PAD] behind the vocabulary, because the file pads.
    assert tokenizer.kind == "huggingface" and tokenizer.vocab_size == len(truth) - 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (truth.bos_token_id, truth.eos_token_id)
    file_sha256 = hashlib.sha256((huggingface_folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.file_sha256 == file_sha256
    assert tokenizer.fingerprint == hashlib.sha256(json.dumps([file_sha256, 0, 1]).encode()).hexdigest()
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.description() == tokenizer.description() and again.encode_batch(TEXTS) == ids


def test_special_tokens_in_text_are_text(huggingface_folder, sentencepiece_model):
    plain = AutoTokenizer.from_pretrained(huggingface_folder)
    assert plain.eos_token_id in plain("a </s> b", add_special_tokens=False).input_ids  # The interface must avoid this.
    for path in (huggingface_folder, sentencepiece_model):
        tokenizer = load_tokenizer(path)
        (ids,) = tokenizer.encode_batch(["a </s> b <s>"])
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
        assert tokenizer.decode(ids) == "a </s> b <s>"


def test_other_published_forms(tmp_path, huggingface_folder, sentencepiece_model):
    """What else models are published with: the message says what to give instead."""
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path / "tokenizer.model.v3").kind == "sentencepiece"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for path, content, message in (
        ("meta/tokenizer.model", "IQ== 0\nIg== 1\n", "a tiktoken vocabulary, which lacks the rule .* tokenizer.json"),
        ("x.tiktoken", "IQ== 0\nIg== 1\n", "a tiktoken vocabulary"),
        ("qwen/qwen.tiktoken", "IQ== 0\n", r"qwen.tiktoken lacks the rule that splits text; give a folder with"),
        ("lfs/tokenizer.model", pointer, "pointer of Git LFS in place of the file; fetch it"),
        ("lfs/tokenizer.json", pointer, "its tokenizer.json is a pointer of Git LFS"),
        ("file/tokenizer.json", "{}", f"give its folder, {tmp_path / 'file'}, whose"),
        ("gpt2/merges.txt", "a b\n", r"no tokenizer.json; write one .*from_pretrained\(.*gpt2.\)\.save_pretrained"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
        (tmp_path / "gpt2").mkdir(exist_ok=True)
        (tmp_path / "gpt2/vocab.json").write_text('{"a": 0}')
        is_folder = not path.startswith(("x", "file"))
        with pytest.raises(UserError, match=message):
            load_tokenizer((tmp_path / path).parent if is_folder else tmp_path / path)


def test_unusable_tokenizers(tmp_path, huggingface_folder):
    with pytest.raises(
        UserError, match="'nobody/nothing': neither a local folder nor a tokenizer that can be reached on the hub"
    ):
        load_tokenizer("nobody/nothing")
    for path in [tmp_path, tmp_path / "none", "none.model", "./none", "a/b/c"]:
        with pytest.raises(UserError, match="neither a SentencePiece"):
            load_tokenizer(path)
    backend = Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="no eos_token"):
        load_tokenizer(tmp_path / "no_eos")
    words = Tokenizer(models.WordLevel({"[U]": 0, "END": 1}, unk_token="[U]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="END").save_pretrained(tmp_path / "word")
    with pytest.raises(UserError, match="literal text 'END' is encoded as its end-of-document id 1"):
        load_tokenizer(tmp_path / "word")
    for content in (b"\x00", b"", b"plain text\n"):
        (tmp_path / "x.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path / "x.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 10),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=30,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="no end-of-sentence id"):
        load_tokenizer(tmp_path / "no_eos.model")


def test_training_is_repeatable_and_learns_newlines_and_indentation(tmp_path):
    text = "".join(f"def f{i}(x):\n    if x:\n        return {i}\n\n" for i in range(500))
    for name in ("a", "b"):
        train_sentencepiece([text, text[:1000]], 310, tmp_path / f"{name}.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a.model")
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    pieces = [processor.id_to_piece(i) for i in set(ids)]
    assert any(piece.endswith(":\n") for piece in pieces) and "▁▁▁▁" in pieces
    assert not any(
        len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces
    )  # Every digit is a piece of its own.
