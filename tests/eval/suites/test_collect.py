"""Test the table of many results: its rows, its columns, and results that cannot be combined."""

import json
from pathlib import Path

import pytest

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.eval.suites.collect import Collection, collect


def write(folder: Path, step: int, values: dict[str, float], limit: int | None = None) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"task": task, "metric": "exact_match", "filter": "strict", "value": value, "stderr": 0.01}
        for task, value in values.items()
    ]
    # An array task exports into its own folder: the path differs, but name and weights do not.
    model = {"path": f"/tmp/{folder.name}/step-{step}", "training": {"step": step}, "weights_sha256": {"m": str(step)}}
    (folder / "results.json").write_text(json.dumps({"model": model, "metrics": rows, "limit": limit}))


def test_one_row_per_model_and_one_column_per_metric(tmp_path, capsys):
    write(tmp_path / "step-200/fast", 200, {"a": 0.5})
    write(tmp_path / "step-200/code", 200, {"b": 0.25})
    write(tmp_path / "step-30/fast", 30, {"a": 0.125})
    write(tmp_path / "step-30/.code.new.7", 30, {"b": 0.9})  # this one is still being written
    assert main(["eval", "--collect", str(tmp_path)]) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert table[0] == "| model | step | b exact_match (strict) | a exact_match (strict) |"  # by path: code, fast
    cells = [dict(zip(table[0].split(" | "), line.split(" | "), strict=True)) for line in table[2:]]
    a, b = (next(key for key in cells[0] if f"{task} exact" in key) for task in "ab")
    assert [c["step"] for c in cells] == ["30", "200"]  # by number, not by name
    assert [c[a].strip(" |") for c in cells] == ["0.1250 ± 0.0100", "0.5000 ± 0.0100"]
    assert [c[b].strip(" |") for c in cells] == ["", "0.2500 ± 0.0100"]


def test_results_on_a_part_of_the_documents_are_separate(tmp_path):
    write(tmp_path / "x", 1, {"a": 0.5})
    write(tmp_path / "y", 1, {"a": 0.75}, limit=10)
    assert "a exact_match (strict), first 10" in collect([tmp_path])


def test_results_that_cannot_be_collected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no results.json"):
        collect([tmp_path / "empty"])
    write(tmp_path / "x", 1, {"a": 0.5})
    write(tmp_path / "y", 1, {"a": 0.75})
    with pytest.raises(UserError, match=r"y/results.json says a exact_match \(strict\) = 0.7500 .* say 0.5000"):
        collect([tmp_path])


def test_models_that_only_their_place_tells_apart(tmp_path):
    for value, place in ((0.5, "a"), (0.25, "b")):
        write(tmp_path / place / "x/hf/eval/fast", 20, {"a": value})
        path = tmp_path / place / "x/hf/eval/fast/results.json"
        results = json.loads(path.read_text())
        results["model"] = {"path": f"/{place}/x/hf", "training": {"step": 20}, "weights_sha256": place}
        path.write_text(json.dumps(results))
    table = collect([tmp_path])
    assert f"| {tmp_path}/a/x/hf/eval | 20 | 0.5000" in table and f"| {tmp_path}/b/x/hf/eval | 20 | 0.2500" in table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"metrics": ', "cannot be read (Expecting value"),
        ("", "cannot be read (Expecting value"),
        ("[3]", "holds no JSON object"),
        ('{"metrics": [], "schema_version": 2}', "has schema_version 2, and this program reads 1; update lrnn"),
    ],
)
def test_results_that_cannot_be_read(tmp_path, capsys, content, message):
    write(tmp_path / "x", 1, {"a": 0.5})
    (tmp_path / "y").mkdir()
    (tmp_path / "y/results.json").write_text(content)
    for request in (["--collect", tmp_path], ["--compare", tmp_path / "x", tmp_path / "y"]):
        assert main(["eval", *map(str, request)]) == 2
        assert f"{tmp_path / 'y/results.json'} {message}" in capsys.readouterr().err


def test_results_of_other_programs_are_passed_over(tmp_path):
    write(tmp_path / "x", 1, {"a": 0.5})
    (tmp_path / "y").mkdir()
    (tmp_path / "y/results.json").write_text('{"metrics": {"loss": 1}}')
    assert "a exact_match" in collect([tmp_path])


def test_models_of_one_name_are_told_apart_by_their_runs(tmp_path):
    """A batch job exports a checkpoint into a folder of its own, whose name says nothing."""
    for run, value in (("a", 0.25), ("b", 0.5)):
        folder = tmp_path / run / "eval/step-20/fast"
        write(folder, 20, {"task": value})
        results = json.loads((folder / "results.json").read_text())
        results["model"] |= {"path": "/tmp/lrnn-eval-x1y2z3/step-20", "weights_sha256": {"m": run}}
        (folder / "results.json").write_text(json.dumps(results))
    table = collect([tmp_path])
    assert "| a/step-20 | 20 | 0.2500" in table and "| b/step-20 | 20 | 0.5000" in table


def test_names_tell_checkpoints_apart():
    """A step that happens to be part of a folder's name does not name it."""
    keys = [("340m", 34, "a"), ("340m", 40, "b"), ("step-00000040", 40, "c"), ("hf", -1, "d")]
    collection = Collection({}, {}, {key: key[0] for key in keys}, [])
    assert [collection.name(key) for key in keys] == ["340m, step 34", "340m, step 40", "step-00000040", "hf"]
