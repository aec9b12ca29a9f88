"""Test that ids are those of `tokenizer.json`, whatever class, configuration or copy is involved."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lrnn import cli
from lrnn.errors import UserError
from lrnn.pretrain.corpus.reader import TokenCorpus, check_model_matches_corpora
from lrnn.pretrain.progress import check_same_run
from lrnn.tokenizer import COPY_MARK, fingerprint_of_0_1_0, load_copy, load_tokenizer

EOS = "<|endoftext|>"
TEXTS = [
    "x = 1000000 + 365 * 24\n    return  2024-11-30\n",
    "    indented",
    "e\u0301 日本 🎉",
    f"a{EOS}b <|im_start|> {EOS}",
]
CLASSES = ["PreTrainedTokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Return a tokenizer.json that splits numbers into digits, which transformers' classes of GPT-2 and Qwen do not."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, "1000000 365 24 2024"] * 5, trainer)
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def folder_of(folder: Path, file: Path, config: dict | None = None, **settings) -> Path:
    folder.mkdir()
    shutil.copy(file, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def truth(file: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


@pytest.mark.parametrize("model_type", [None, "gpt_bigcode", "olmo2"])
def test_the_class_does_not_matter(file, tmp_path, model_type):
    config = None if model_type is None else {"model_type": model_type}
    folders = [folder_of(tmp_path / c, file, config, tokenizer_class=c, bos_token=EOS, eos_token=EOS) for c in CLASSES]
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode_batch(TEXTS) == truth(file)
        tokenizer.save(folder / "copy")
        (folder / "copy/config.json").write_text(json.dumps({"model_type": "gpt2"}))  # beside the copy, as in an export
        assert load_tokenizer(folder / "copy").encode_batch(TEXTS) == truth(file)
        assert load_copy(folder / "copy").description() == tokenizer.description()
        of_transformers = AutoTokenizer.from_pretrained(folder / "copy")
        assert [of_transformers(t, split_special_tokens=True).input_ids for t in TEXTS] == truth(file)
    assert len({load_tokenizer(folder).fingerprint for folder in folders}) == 1


def test_the_fingerprint_covers_beginning_and_end_of_documents(file, tmp_path):
    named = [{"eos_token": EOS}, {"eos_token": "<|im_start|>"}, {"bos_token": "<|im_start|>", "eos_token": EOS}]
    folders = [folder_of(tmp_path / str(i), file, **names) for i, names in enumerate(named)]
    assert len({load_tokenizer(folder).fingerprint for folder in folders}) == 3
    assert len({load_tokenizer(folder).file_sha256 for folder in folders}) == 1


def test_names_of_special_tokens(file, tmp_path):
    by_class = load_tokenizer(folder_of(tmp_path / "a", file, {"model_type": "gpt2"}, model_max_length=8))
    assert (by_class.bos_token_id, by_class.eos_token_id) == (0, 0)
    folder = folder_of(tmp_path / "b", file, bos_token=None, eos_token={"content": EOS, "__type": "AddedToken"})
    assert (load_tokenizer(folder).bos_token_id, load_tokenizer(folder).eos_token_id) == (None, 0)
    folder = folder_of(tmp_path / "c", file)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": EOS}))
    assert load_tokenizer(folder).document_prefix == [1]
    by_class.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").description() == by_class.description()


def test_refused_files(file, tmp_path):
    content = json.loads(file.read_text())
    for name, changed, message in (
        (
            "dropout",
            content | {"model": content["model"] | {"dropout": 0.1}},
            "has dropout 0.1, which makes ids random",
        ),
        ("broken", content | {"model": 3}, r"its tokenizer.json cannot be read \("),
    ):
        folder = folder_of(tmp_path / name, file, eos_token=EOS, bos_token=None)
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_tokenizer(folder)
    with pytest.raises(UserError, match=r"its bos_token '<s>' is not in tokenizer.json"):
        load_tokenizer(folder_of(tmp_path / "unknown", file, eos_token=EOS, bos_token="<s>"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "its tokenizer_config.json should hold a JSON object, not list"),
        ("tokenizer_config.json", "3", "its tokenizer_config.json should hold a JSON object, not int"),
        ("special_tokens_map.json", '"x"', "its special_tokens_map.json should hold a JSON object, not str"),
        ("tokenizer_config.json", '{"eos_token": "x", "bos_token": 7}', "its bos_token should be text, not 7"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": 5, "auto_map": {}}',
            "its tokenizer_class should be text, not 5",
        ),
    ],
)
def test_settings_that_are_none(file, tmp_path, name, content, message):
    folder = folder_of(tmp_path / "a", file, eos_token=EOS, bos_token=None)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_corpus_of_0_1_0_keeps_the_rules_that_made_it(file, tmp_path, tokenizer_class):
    """There the ids were those of the class, and the fingerprint was the checksum of the file."""
    named = folder_of(tmp_path / "named", file, tokenizer_class=tokenizer_class, bos_token=EOS, eos_token=EOS)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(TEXTS[0])
    new, old = tmp_path / "new", tmp_path / "old"
    command = ["corpus", tmp_path / "text", "--tokenizer", named, "--processes", "1", "--out", new]
    assert cli.main(list(map(str, command))) == 0
    shutil.copytree(new, old)
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = manifest["tokenizer"].pop("file_sha256")
    (old / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(named / "tokenizer_config.json", old / "tokenizer")
    assert COPY_MARK not in (old / "tokenizer/tokenizer_config.json").read_text()

    same = tokenizer_class == "PreTrainedTokenizerFast"
    backend = AutoTokenizer.from_pretrained(old / "tokenizer").backend_tokenizer
    backend.encode_special_tokens = True
    used = load_copy(old / "tokenizer")
    assert used.encode_batch(TEXTS) == [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert (used.encode_batch(TEXTS) == truth(file)) == same
    corpora = [TokenCorpus(old), TokenCorpus(new)]
    assert (corpora[0].tokenizer_fingerprint == corpora[1].tokenizer_fingerprint) == same
    if not same:
        with pytest.raises(UserError, match="were made with different tokenizers"):
            check_model_matches_corpora(500, None, corpora)
    check_model_matches_corpora(500, manifest["tokenizer"]["fingerprint"], [corpora[0]])
    assert fingerprint_of_0_1_0(str(named), load_tokenizer(named)) == (
        corpora[0].tokenizer_file_sha256 if same else None
    )


def test_a_checkpoint_with_the_fingerprint_of_0_1_0_is_resumed(tmp_path):
    from lrnn import LrnnConfig

    config = LrnnConfig()
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    (tmp_path / "progress.json").write_text(json.dumps({"data": {"tokenizer": "old", "seed": 1}}))
    now = {"tokenizer": "new", "seed": 1}
    check_same_run(tmp_path, config, now, as_of_0_1_0={"tokenizer": "old"})
    with pytest.raises(UserError, match="tokenizer = 'old', now it is 'new'"):
        check_same_run(tmp_path, config, now, as_of_0_1_0={"tokenizer": "older"})
