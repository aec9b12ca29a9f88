"""Test that a text begins with one bos in evaluation, as the export's tokenizer_config.json says or the user."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.model_folder import says_add_bos
from lrnn.eval.suites import evaluate as evaluation
from lrnn.eval.suites.harness import load_model

TEXT = "def f(x):\n    return </s> 1"


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_model(tiny_model, "cpu", "float32", 2, 64, True)[0]


@pytest.fixture(scope="module")
def plain(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def test_prompts_begin_with_one_bos(lm, plain):
    bos = lm.prefix_token_id
    assert lm.tok_encode(TEXT) == [bos, *plain(TEXT)]
    assert lm.tok_encode(TEXT, add_special_tokens=False) == plain(TEXT)
    assert lm._encode_pair("def f", "(x)")[0] == [bos, *plain("def f")]
    ids, mask = lm.tok_batch_encode(["def", TEXT])
    short, long = (row[m == 1].tolist() for row, m in zip(ids, mask, strict=True))
    assert (short, long) == ([bos, *plain("def")], [bos, *plain(TEXT)]) and mask[0, 0] == 0 and mask[0, -1] == 1
    ids, mask = lm.tok_batch_encode(["def", TEXT], left_truncate_len=3)
    assert ids.shape == mask.shape == (2, 3) and ids[1].tolist() == plain(TEXT)[-3:]


def test_whole_documents_begin_with_one_bos(lm, plain, monkeypatch):
    windows = []
    monkeypatch.setattr(
        type(lm).__mro__[1],
        "_loglikelihood_tokens",
        lambda self, requests, **_: windows.extend(requests) or [(0.0, True)],
    )
    lm.loglikelihood_rolling([SimpleNamespace(args=("def f(x)",))])
    ((_, context, continuation),) = windows
    assert (context, continuation) == ([lm.prefix_token_id], plain("def f(x)")) and lm.add_bos_token is True


def test_without_bos_and_as_the_tokenizer_does(tiny_model, plain):
    for said in (False, None):
        assert load_model(tiny_model, "cpu", "float32", 2, 64, said)[0].tok_encode(TEXT) == plain(TEXT)


def test_the_folder_decides_unless_told_otherwise(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    told = []

    def stop(*arguments):
        told.append(arguments[-1])
        raise UserError("far enough")

    monkeypatch.setattr(evaluation.harness, "load_model", stop)
    monkeypatch.setattr(evaluation.harness, "load_tasks", lambda tasks: {})
    monkeypatch.setattr(evaluation, "check_lengths", lambda *_: None)
    monkeypatch.setattr(evaluation, "go_offline", lambda: None)
    for said in ({}, {"add_bos_token": True}, {"add_bos_token": False}):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | said))
        for option in ([], ["--add-bos-token"], ["--no-add-bos-token"]):
            assert cli.main(["eval", str(folder), "--suite", "quick", *option]) == 2
    assert told == [None, True, False, True, True, False, False, True, False]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": "yes"}))
    with pytest.raises(UserError, match="add_bos_token should be true or false, it is 'yes'"):
        says_add_bos(folder)
