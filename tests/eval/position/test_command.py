"""Test `lrnn position` end to end, and with bad input."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hostile import add_hostile_code, hostile_pickle, hostile_python
from position_models import TRAINED, make_model, write_heldout
from transformers import AutoModelForCausalLM

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval import documents
from lrnn.eval.model_folder import describe_model
from lrnn.eval.position import evaluate as position_evaluate
from lrnn.eval.position import nll as position_nll
from lrnn.eval.suites.collect import collect
from lrnn.eval.suites.compare import compare
from lrnn.files import sha256
from lrnn.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return make_model(tiny_model, tmp_path_factory.mktemp("models") / "negative")


@pytest.fixture(scope="module")
def other(tiny_model, tmp_path_factory):
    return make_model(tiny_model, tmp_path_factory.mktemp("models") / "positive", negative=False, seed=1)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def texts(tmp_path):
    return write_heldout(tmp_path / "heldout.jsonl")


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments):
    return cli.main(["position", *map(str, arguments), "--device", "cpu"])


def test_two_models(folder, other, texts, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, other, "--documents", texts, "--out", out, "--piece", 100) == 0
    results = json.loads((out / "results.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == [
        "difference.csv",
        "position.csv",
        "position.png",
        "results.json",
        "table.md",
    ]
    assert (out / "position.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert results["settings"]["max_length"] == 16 * TRAINED and results["settings"]["dtype"] == "float32"
    assert results["data"]["taken"] == 3 and results["data"]["documents_sha256"] == sha256(texts)
    assert [m["training_length"] for m in results["models"]] == [TRAINED] * 2
    assert results["models"][1]["weights_sha256"] == describe_model(other)["weights_sha256"]
    assert results["environment"]["torch"] == torch.__version__
    assert len(results["notes"]) == 1 and "with 3 documents the bands are too narrow" in results["notes"][0]
    with (out / "position.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = documents.find_documents(texts, tokenizer, 512, 512)
    for path in (folder, other):
        reader = AutoModelForCausalLM.from_pretrained(path).eval()
        ids = torch.tensor(np.stack([documents.load_ids(texts, d, tokenizer)[0] for d in found]), dtype=torch.int64)
        nll = torch.cat(list(position_nll.piecewise_nll(reader, ids, 9999)), 1).double().numpy()
        mine = [row for row in rows if row["name"] == str(path)]
        assert mine[0]["from"] == "1" and mine[-1]["to"] == "512" and str(TRAINED) in [row["to"] for row in mine]
        for row in mine:
            values = nll[:, int(row["from"]) - 1 : int(row["to"])]
            assert int(row["tokens"]) == values.size and row["documents"] == "3"
            assert float(row["nll"]) == pytest.approx(values.mean(), abs=1e-5)
            assert float(row["ppl"]) == pytest.approx(math.exp(values.mean()), rel=1e-5)
            assert float(row["low"]) <= float(row["nll"]) <= float(row["high"])
            assert float(row["ppl_low"]) == pytest.approx(math.exp(float(row["low"])))
    with (out / "difference.csv").open() as file:
        differences = list(csv.DictReader(file))
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    for row, first, second in zip(differences, *halves, strict=True):
        assert row["name"] == f"{other} - {folder}" and row["from"] == first["from"]
        assert float(row["difference"]) == pytest.approx(float(second["nll"]) - float(first["nll"]))
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])


def test_the_same_model_twice_differs_by_nothing(folder, texts, tmp_path):
    assert run(folder, folder, "--documents", texts, "--out", tmp_path / "out", "--min-tokens", 20) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    (rows,) = results["differences"]
    assert rows and not any(row[key] for row in rows for key in ("difference", "low", "high"))
    assert [row["documents"] for row in rows] == sorted((row["documents"] for row in rows), reverse=True)
    assert rows[0]["documents"] == 7 and rows[-1]["documents"] == 3


def test_one_model_and_joined_documents(folder, texts, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    assert run(copy, "--documents", texts, "--join", "--max-length", 256) == 0
    out = copy / "eval/position"
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["join"] and results["differences"] == [] and not (out / "difference.csv").exists()
    assert "documents were joined into" in (out / "table.md").read_text()
    assert run(copy, "--documents", texts, "--max-length", 128) == 0, "an earlier result is replaced"
    assert "were joined" not in (out / "table.md").read_text()
    with pytest.raises(UserError, match=r"holds no results\.json"):
        collect([copy])
    with pytest.raises(UserError, match="`lrnn position` itself compares"):
        compare(out, out)


def test_a_model_that_breaks_down_is_a_result(folder, texts, tmp_path, monkeypatch):
    original = position_nll.token_nll
    monkeypatch.setattr(position_nll, "token_nll", lambda *args: original(*args).log() * math.nan)
    assert run(folder, "--documents", texts, "--out", tmp_path / "out", "--max-length", 64) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert "log-likelihoods of 3 documents are not finite" in results["notes"][0] + results["notes"][1]
    assert {row["ppl"] for row in results["curves"][0]} == {None}


def test_no_code_of_the_folder_is_run(folder, texts, tmp_path):
    copy, marks = tmp_path / "model", tmp_path / "marks"
    shutil.copytree(folder, copy)
    marks.mkdir()
    add_hostile_code(copy, marks / "tokenizer", known_class=True)
    (copy / "modeling_own.py").write_text(hostile_python(marks / "model"))
    auto_map = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (copy / "pytorch_model.bin").write_bytes(hostile_pickle(marks / "pickle"))
    assert run(copy, "--documents", texts, "--max-length", 64) == 0
    assert list(marks.iterdir()) == []


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def error_of(folder, texts, tmp_path, capsys, monkeypatch):
    """Return a function that gives the error line of a bad request, which must come before any model is loaded."""
    monkeypatch.setattr(position_evaluate, "load_model", lambda *args: pytest.fail("the model was loaded"))

    def call(*arguments, models=(folder,), path=texts):
        capsys.readouterr()
        arguments = arguments if "--out" in arguments else (*arguments, "--out", tmp_path / "results")
        assert cli.main(["position", *map(str, models), "--documents", str(path), *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return call


@pytest.mark.parametrize("option", ["--max-length", "--min-tokens", "--piece", "--batch-size", "--bins-per-octave"])
def test_sizes_are_at_least_one(error_of, option):
    assert f"{option} must be at least 1, got 0" in error_of(option, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", 1), "--limit must be at least 2, got 1"),
        (("--device", "abacus"), "--device abacus cannot be used"),
        (("--device", "cuda:99"), "--device cuda:99 cannot be used"),
        (("--dtype", "int8"), "--dtype int8 is not a floating-point dtype; give float32"),
        (("--max-length", 5000), "0 of 7 documents have at least 5,000 tokens"),
        (("--max-length", 9999, "--join"), "do not join into two of 9,999 tokens"),
    ],
)
def test_bad_options(error_of, arguments, message):
    assert message in error_of(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "document file not found"),
        ("", "0 of 0 documents"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2: expected a JSON object"),
        ('{"text": "a"}\nplain\n', "line 2: expected a JSON object"),
        ('{"text": 3}\n', "must be a string, got int"),
        ('{"text": "a"}\n{"text": "b\\ud800"}\n', "line 2: half a surrogate pair"),
    ],
)
def test_bad_documents(error_of, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in error_of(path=path)


def test_bad_models(error_of, folder, other, tmp_path, capsys):
    assert "model folder not found: /nowhere" in error_of(models=[folder, "/nowhere"])
    assert "name a folder for the results of several models" in one_line(capsys, folder, other)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").touch()
    assert "holds other files" in error_of("--out", full)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert "ids, its model only 100: they do not belong together" in error_of(models=[copy])
    del config["max_position_embeddings"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "does not say its training length (max_position_embeddings): give --max-length" in error_of(models=[copy])
    (copy / "tokenizer.json").unlink()
    assert f"tokenizer {copy}: neither" in error_of("--max-length", 64, models=[copy])
    (copy / "tokenizer_config.json").unlink()
    assert "is not an exported model" in error_of(models=[copy])


def one_line(capsys, *models):
    capsys.readouterr()
    assert cli.main(["position", *map(str, models), "--documents", "x"]) == 2
    return capsys.readouterr().err


def test_models_with_different_tokenizers_are_not_compared(error_of, folder, tmp_path):
    """A tokenizer whose file merely looks different is accepted."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spec = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(copy).fingerprint != load_tokenizer(folder).fingerprint
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        error_of(models=[folder, copy])
    spec["model"]["merges"] = spec["model"]["merges"][:1]
    (copy / "tokenizer.json").write_text(json.dumps(spec))
    assert "have different tokenizers" in error_of(models=[folder, copy])
