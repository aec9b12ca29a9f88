"""Test which ids a prompt begins with: one bos, several or none, by the rule, the folder and the tokenizer."""

import json
import shutil
from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.model_folder import says_add_bos
from lrnn.eval.suites import bos, harness
from lrnn.eval.suites.model import Model

TEXT = "def f(x):\n    return </s> 1"
BOS = 0


@pytest.fixture(scope="module")
def plain(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids


def copy(model, folder, said=None, prefix=""):
    """Return a copy whose tokenizer_config.json says something of bos, or whose tokenizer adds a prefix itself."""
    shutil.copytree(model, folder)
    if prefix:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{prefix} $A", special_tokens=special)
        tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": PreTrainedTokenizerFast.__name__}
    settings |= {} if said is None else {"add_bos_token": said}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    parent = tmp_path_factory.mktemp("folders")
    return {
        "export": copy(tiny_model, parent / "export", said=True),
        "says no": copy(tiny_model, parent / "no", said=False),
        "adds none": copy(tiny_model, parent / "none"),
        "adds bos": copy(tiny_model, parent / "adds", prefix="<s>"),
        "adds two": copy(tiny_model, parent / "two", prefix="</s> <s>"),
    }


def first_ids(lm, monkeypatch):
    """Return the ids that the model reads for a choice, a generation, and each window of a whole document."""
    scored, generated = [], []
    monkeypatch.setattr(
        HFLM,
        "_loglikelihood_tokens",
        lambda self, requests, **_: scored.extend(requests) or [(0.0, True)] * len(requests),
    )
    monkeypatch.setattr(
        HFLM, "_model_generate", lambda self, context, **_: generated.extend(context.tolist()) or context
    )
    lm.loglikelihood([SimpleNamespace(args=("def f", "(x)"))], disable_tqdm=True)
    lm.generate_until([SimpleNamespace(args=("def f", {"until": ["\n"], "max_gen_toks": 4}))], disable_tqdm=True)
    choice = [scored[0][1], scored[0][2]]
    scored.clear()
    lm.loglikelihood_rolling([SimpleNamespace(args=("def f(x)",))])
    monkeypatch.undo()
    return choice, generated[0], [tuple(request[1:]) for request in scored]


@pytest.mark.parametrize(
    ("kind", "rule", "prefix"),
    [
        *[("export", rule, ids) for rule, ids in (("auto", [BOS]), ("always", [BOS]), ("never", []))],
        *[("adds bos", rule, ids) for rule, ids in (("auto", [BOS]), ("always", [BOS]), ("never", []))],
        *[("adds none", rule, ids) for rule, ids in (("auto", []), ("always", [BOS]))],
        ("says no", "auto", []),
        ("adds two", "auto", [1, BOS]),
    ],
)
def test_first_ids_of_a_choice_a_generation_and_a_document(folders, plain, monkeypatch, kind, rule, prefix):
    lm = Model(folders[kind], bos=rule, device="cpu", max_length=64)
    choice, generation, windows = first_ids(lm, monkeypatch)
    assert choice == [[*prefix, *plain("def f")], plain("(x)")]
    assert generation == [*prefix, *plain("def f")]
    assert windows == [([BOS], plain("def f(x)"))], "a whole document has one bos under every rule"
    assert lm.settings["bos"] == rule and lm.settings["bos_ids"] == prefix
    assert lm.tok_encode(TEXT, add_special_tokens=False) == plain(TEXT)


def test_the_numbers_are_those_of_hflm_where_the_tokenizer_adds_bos(folders):
    options = {"device": "cpu", "dtype": "float32", "max_length": 64}
    ours, theirs = Model(folders["adds bos"], **options), HFLM(str(folders["adds bos"]), **options)
    requests = [SimpleNamespace(args=pair) for pair in (("def f", "(x)"), ("", "return"), ("x = ", "1"))]
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], rel=1e-6)
    assert ours.tok_batch_encode(["<s>def", "def f(x):"])[0].tolist()[0][-1:] == [ours.tok_encode("def")[-1]]


def test_bos_survives_the_cut_from_the_left_and_is_never_there_twice(folders, plain, monkeypatch):
    lm = Model(folders["export"], device="cpu", max_length=8)
    ids = plain(TEXT)
    assert lm.tok_encode(TEXT, left_truncate_len=3) == [BOS, *ids[-2:]]
    batch, mask = lm.tok_batch_encode(["def", TEXT], left_truncate_len=6)
    assert batch[1].tolist() == [BOS, *ids[-5:]] and mask[1].tolist() == [1] * 6
    short = [token for token, real in zip(batch[0].tolist(), mask[0].tolist(), strict=True) if real]
    assert short == [BOS, *plain("def")] and mask[0, -1] == 1
    assert lm.tok_encode("<s>" + TEXT) == lm.tok_encode(TEXT) == [BOS, *ids]  # a chat template writes its own
    scored = []
    monkeypatch.setattr(
        HFLM, "_loglikelihood_tokens", lambda self, requests, **_: scored.extend(requests) or [(0, True)]
    )
    lm.loglikelihood([SimpleNamespace(args=(TEXT, "(x)"))], disable_tqdm=True)
    ((_, context, continuation),) = scored
    assert continuation == plain(TEXT + "(x)")[len(ids) :], "the continuation is whole"
    assert len(context) + len(continuation) == 9 and context[0] == BOS and context[1:] == ids[-len(context) + 1 :]


def test_a_rule_that_cannot_be(folders, plain):
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(UserError, match="neither bos nor eos"):
        bos.decide("auto", Bare(), None)

    class Strange:
        bos_token_id = eos_token_id = 1

        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=[1, 5] if add_special_tokens else [4])

    with pytest.raises(UserError, match=r"has the ids \[4\] for the text 'a', and \[1, 5\] with special tokens"):
        bos.decide("auto", Strange(), None)
    assert bos.decide("auto", Strange(), True).ids == (1,)
    with pytest.raises(UserError, match="--bos must be one of auto, always, never; it is 'yes'"):
        bos.decide("yes", Bare(), None)
    (folders["says no"] / "tokenizer_config.json").write_text('{"add_bos_token": "yes"}')
    with pytest.raises(UserError, match="add_bos_token should be true or false, it is 'yes'"):
        says_add_bos(folders["says no"])


def test_old_spellings_of_the_rule(tiny_model, tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(harness, "load_tasks", lambda *_, **__: told.append(1) or 1 / 0)
    for options, line in (
        (["--add-bos-token"], "--add-bos-token is now --bos always"),
        (["--no-add-bos-token"], "--no-add-bos-token is now --bos never"),
    ):
        with pytest.raises(ZeroDivisionError):
            cli.main(["eval", str(tiny_model), "--suite", "quick", "--out", str(tmp_path / "out"), *options])
        assert line in capsys.readouterr().out
    assert cli.main(["eval", str(tiny_model), "--suite", "quick", "--add-bos-token", "--bos", "never"]) == 2
    assert "--add-bos-token contradicts --bos never" in capsys.readouterr().err and len(told) == 2
