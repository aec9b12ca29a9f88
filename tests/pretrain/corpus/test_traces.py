"""Test `lrnn corpus --traces`: the documents and their parts, options that do not belong to it."""

import json

import datasets
import pytest
import sentencepiece

from lrnn.cli import main
from lrnn.pretrain.corpus import source
from lrnn.tokenizer import train_sentencepiece
from lrnn.traces.training import training_document


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([training_document(number, 8) for number in range(30)], 300, path)
    return path


def test_documents_of_a_corpus(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MIN_PART_BYTES", 8 << 10)
    out = tmp_path / "traces"
    command = ["--traces", 50, "--traces-max-changes", 8, "--tokenizer", tokenizer, "--heldout", 0.2, "--processes", 1]
    assert main(["corpus", *map(str, command), "--out", str(out)]) == 0
    texts = [training_document(number, 8) for number in range(50)]
    heldout = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert 2 < len(heldout) < 25
    assert all(row["text"] == texts[int(row["source"].removeprefix("traces:")) - 1] for row in heldout)
    held = {row["text"] for row in heldout}
    encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode
    ids = datasets.load_from_disk(str(out / "train"))["tokens"][:]
    assert ids == [[1, *encode(text), 2] for text in texts if text not in held]
    manifest = json.loads((out / "manifest.json").read_text())
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert manifest["arguments"]["traces"] == 50 and manifest["arguments"]["traces_max_changes"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a SOURCE, or give --traces N"),
        (["a.txt", "--traces", "5"], "--traces 5 generates its documents and takes no SOURCE, but got 'a.txt'"),
        (["a.txt", "--traces-max-changes", "5"], "--traces-max-changes is about generated programs"),
        (["--traces", "0"], "--traces 0 should be at least 1"),
        (["--traces", "5", "--traces-max-changes", "3"], "--traces-max-changes 3 should be at least 4"),
        (["--traces", "5", "--streaming"], "--streaming is about files or data sets"),
        (["--traces", "5", "--include", "*.py"], "--include is about files or data sets"),
        (["--traces", "5", "--text-column", "code"], "--text-column is about files or data sets"),
    ],
)
def test_options_that_make_no_sense(options, message, tmp_path, capsys):
    command = ["corpus", *options, "--train-tokenizer", "300", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lrnn: error: ") and message in line


def test_nothing_left_to_train_on(tokenizer, tmp_path, capsys):
    command = ["--traces", 1, "--heldout", 0.999, "--tokenizer", tokenizer, "--processes", 1, "--out", tmp_path / "out"]
    assert main(["corpus", *map(str, command)]) == 2
    assert "empty corpus: --traces 1 gives no train document beside those held out" in capsys.readouterr().err
