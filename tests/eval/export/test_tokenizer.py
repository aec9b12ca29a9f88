"""Test that the exported tokenizer gives the ids of the tokenizer that the corpus was encoded with."""

import json
import random
import re
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lrnn import cli, tokenizer_export
from lrnn.errors import UserError
from lrnn.eval.export import tokenizer as exporter
from lrnn.eval.export.tokenizer import compare_tokenizers, export_tokenizer
from lrnn.sentencepiece_bpe import convert_bpe
from lrnn.tokenizer import load_tokenizer, train_sentencepiece
from lrnn.tokenizer_export import ODD_TEXTS, check_exportable, real_texts

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def training_texts() -> list[str]:
    return [(STDLIB / name).read_text() for name in ("typing.py", "ast.py", "pdb.py")]


def other_texts() -> list[str]:
    """Return text on which the tokenizer was not trained and that the exporter does not compare."""
    texts = [(STDLIB / name).read_text() for name in ("tarfile.py", "re/_parser.py", "site.py")]
    return [text[i : i + 3000] for text in texts for i in range(0, len(text), 3000)]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    train_sentencepiece(training_texts(), 2000, path)
    return path


@pytest.fixture(scope="module")
def exported(model_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(load_tokenizer(model_file), folder)
    return folder


def sentencepiece_with(tmp_path, **options) -> Path:
    defaults = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "vocab_size": 500}
    model = tmp_path / "tokenizer.model"
    with model.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_texts()[0].splitlines(keepends=True)),
            model_writer=f,
            minloglevel=2,
            **{**defaults, **options},
        )
    return model


@pytest.mark.parametrize("cls", [AutoTokenizer, PreTrainedTokenizerFast])
def test_ids_equal_those_of_sentencepiece_on_unseen_text(exported, model_file, cls):
    tokenizer = cls.from_pretrained(exported)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    texts = [*other_texts(), *ODD_TEXTS]
    assert sum(map(len, texts)) > 100_000
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == sp.encode(text)
        assert tokenizer.decode(ids) == sp.decode(ids)


def test_text_is_the_same_after_encoding_and_decoding(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for text in other_texts():
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("order", ["shuffled", "by vocabulary"])
def test_wrong_merges_are_found(exported, model_file, tmp_path, order):
    """Also compares the order of transformers' own conversion: by the ids of the parts instead of by score."""
    content = json.loads((exported / "tokenizer.json").read_text())
    merges, vocabulary = content["model"]["merges"], content["model"]["vocab"]
    if order == "shuffled":
        random.Random(0).shuffle(merges)
    else:
        merges.sort(key=lambda m: (vocabulary[m[0]], vocabulary[m[1]]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True)
    with pytest.raises(UserError, match=r"differs from the trained one at token \d+ of"):
        compare_tokenizers(tokenizer, load_tokenizer(model_file), real_texts())


def test_a_wrong_decoder_is_found(model_file):
    backend = convert_bpe(model_file.read_bytes())
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True)
    with pytest.raises(UserError, match="decodes"):
        compare_tokenizers(tokenizer, load_tokenizer(model_file), real_texts())


def test_special_tokens_are_neither_added_nor_matched(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for text in ("", "x = 1", "<s>[INST]</s><unk>"):
        assert not {0, 1, 2} & set(tokenizer(text).input_ids)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode([1, *tokenizer("x = 1").input_ids, 2], skip_special_tokens=True) == "x = 1"


def test_padding_is_on_the_left_and_masked(exported):
    batch = AutoTokenizer.from_pretrained(exported)(["x", "def f(x): return x"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    n = len(batch["input_ids"][0])
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1
    assert batch["attention_mask"][1] == [1] * n


def test_files(exported, model_file):
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows this name too
    assert (exported / "tokenizer.model").read_bytes() == model_file.read_bytes()


SYMBOLS = {"user_defined_symbols": ["<|code|>", "<sep>", "    "]}
COMBINED = "".join(map(chr, [*range(0x300, 0x346), 0x5D0, 0x93C, 0x1161, 0x11A8, 0x200D, 0x3099, 0xFE0F]))
BASES = (
    "aeIoUns 1</s>\n\r\t\x01\xa0\u2581\u03b1\u03b9\xaa\xbd\xc5\xea\ufb01\u1100\uac00\u304b\u0915\u0958\u2460\U0001f1eb"
)


def combined_texts() -> list[str]:
    """Return random texts of letters, marks, compositions and white space, which normalisers treat differently."""
    random_ = random.Random(0)
    return ["".join(random_.choice(BASES + COMBINED) for _ in range(random_.randint(1, 30))) for _ in range(300)]


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": True, "byte_fallback": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, **SYMBOLS},
        {"normalization_rule_name": "identity", "bos_id": -1, "eos_id": 0, "unk_id": 1},
        {"normalization_rule_name": "identity", **SYMBOLS},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "user_defined_symbols": ["<sep>"]},
        {"model_type": "unigram", "remove_extra_whitespaces": True, "byte_fallback": False},
        {"model_type": "unigram", "remove_extra_whitespaces": True, "byte_fallback": False, "bos_id": -1, **SYMBOLS},
    ],
    ids=lambda options: "-".join(map(str, options.values()))[:60],
)
def test_ids_of_other_sentencepiece_models(tmp_path, options, monkeypatch):
    monkeypatch.setattr(exporter, "real_texts", lambda: real_texts()[:30])
    model = sentencepiece_with(tmp_path, **options)
    trained = load_tokenizer(model)
    check_exportable(trained)
    tokenizer = export_tokenizer(trained, tmp_path / "out")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    symbols = [
        "<|code|>x <|code|> y",
        "<sep>",
        "<sep></s>",
        "a<sep> b </s> <s>",
        "\ufb01ne \u2460  \uff57\uff49\u3000 x",
    ]
    for text in [*other_texts()[:20], *ODD_TEXTS, *symbols, *combined_texts()]:
        assert tokenizer(text).input_ids == sp.encode(text), ascii(text)
    again = load_tokenizer(tmp_path / "out")
    assert again.encode_batch(symbols) == [sp.encode(text) for text in symbols]
    assert again.document_prefix == trained.document_prefix == [tokenizer.bos_token_id]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram"}, "is not a BPE model and has byte fallback"),
        ({"model_type": "unigram", "byte_fallback": False}, "is not a BPE model and keeps extra white space"),
        (
            {"remove_extra_whitespaces": True, "user_defined_symbols": ["    "]},
            "could not be exported: .* would encode",
        ),
        ({"treat_whitespace_as_suffix": True}, "does not write a space as .* in front of a word and has byte fallback"),
    ],
)
def test_models_that_cannot_be_exported_are_refused_before_training(tmp_path, options, message, capsys):
    model = sentencepiece_with(tmp_path, **options)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some text")
    command = ["corpus", tmp_path / "text", "--tokenizer", model, "--processes", "1", "--out", tmp_path / "corpus"]
    assert cli.main(list(map(str, command))) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "corpus").exists()


def test_a_conversion_that_is_not_exact_is_found(model_file, monkeypatch):
    def wrong(model: bytes) -> Tokenizer:
        backend = convert_bpe(model)
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), backend.normalizer])
        return backend

    monkeypatch.setattr(tokenizer_export, "convert_bpe", wrong)
    with pytest.raises(UserError, match=r"could not be exported: transformers would encode 'Tie.* as \["):
        check_exportable(load_tokenizer(model_file))


def test_hugging_face_tokenizer_of_a_corpus(tmp_path):
    """Return a byte-level tokenizer that adds a bos and has no pad token, like many on the hub."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(training_texts(), trainer)
    plain = Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    original = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    original.save_pretrained(tmp_path / "hub")
    assert AutoTokenizer.from_pretrained(tmp_path / "hub")("x").input_ids[0] == 0

    export_tokenizer(load_tokenizer(tmp_path / "hub"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*other_texts()[:20], *ODD_TEXTS, "<|begin|>x<|end|>"]:
        assert tokenizer(text).input_ids == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.padding_side == "left"
