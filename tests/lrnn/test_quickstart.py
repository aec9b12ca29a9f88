"""Test the parts of `lrnn quickstart` that need no training, and that the named configurations fit to it."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lrnn import quickstart, shipped
from lrnn.cli import main


def test_the_configuration_reads_the_corpus_that_quickstart_builds():
    config = yaml.safe_load((shipped.RUNS / f"{quickstart.CONFIG}.yaml").read_text())
    assert config["data"]["corpora"] == [{"path": str(quickstart.OUT / "corpus")}]
    assert config["precision"] == "float32", "bfloat16 is much slower on most CPUs"


def test_the_evaluated_text_is_the_beginning_of_the_held_out_documents(tmp_path):
    texts = [f"{i} " + "é" * (200 * i) for i in range(40)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sample = quickstart._sample_of(tmp_path / "heldout.jsonl", tmp_path / "sample.jsonl")
    found = [json.loads(line)["text"] for line in sample.read_text().splitlines()]
    assert found == [text[:4000] for text in texts[:12]] and len(found[-1]) < len(texts[39])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "19"], "--steps 19 should be at least 20"),
        (["--processes", "0"], "--processes 0 should be at least 1"),
        (["--processes", "3"], "--processes 3: global_batch_size=8 has too few samples for 3 processes"),
    ],
)
def test_what_would_fail_half_way_is_refused_at_once(options, message, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path / "out"), *options]) == 2
    out, error = capsys.readouterr()
    assert not out and message in error and not (tmp_path / "out").exists()


def test_what_comes_next(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "my envs" / ".venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    lines = quickstart._next(Path("runs/quickstart"))
    assert lines[0].startswith("source 'my envs/.venv/bin/activate' ")
    assert lines[1].split("  #")[0].strip() == "lrnn pretrain tiny"
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)  # it is active
    lines = quickstart._next(Path("runs/quickstart-2"))
    assert lines[0].startswith(
        "lrnn pretrain tiny run_dir=runs/tiny 'data.corpora=[{path: runs/quickstart-2/corpus}]' "
    )
