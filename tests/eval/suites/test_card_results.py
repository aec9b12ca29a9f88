"""Test that the results of evaluations appear in the model card of an export, and nothing else of it changes."""

import json

import pytest

from lrnn import LrnnConfig
from lrnn.eval.export.model_card import model_card
from lrnn.eval.suites.card_results import update_card

ROW = {"filter": "none", "stderr": 0.0123, "n": 164, "shots": 0, "higher_is_better": False}


def write_results(model, suite: str, value: float, limit: int | None = None) -> None:
    results = {
        "suite": suite,
        "limit": limit,
        "left_out": [],
        "metrics": [{"task": "lrnn_humaneval_bpb", "metric": "bits_per_byte", "value": value, **ROW}],
        "settings": {"dtype": "bfloat16", "max_length": 2048},
        "environment": {
            "device": "NVIDIA H100",
            "lrnn": "0.1.0",
            "lm-eval": "0.4.13",
            "torch": "2.13.0",
            "source": "f00",
        },
    }
    folder = model / "eval" / suite
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def card(tmp_path) -> str:
    kinds = {"export_format": "hf", "dtype": "bfloat16", "num_parameters": 1000, "training": {"step": 1, "tokens": 2}}
    text = model_card("name", LrnnConfig(vocab_size=50), **kinds, data=None, run=None, license=None)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return text


def test_results_are_added_replaced_and_removed(card, tmp_path):
    file = tmp_path / "README.md"
    update_card(tmp_path)
    assert file.read_text() == card and "## Evaluation results" not in card
    write_results(tmp_path, "fast", 0.9876)
    update_card(tmp_path)
    text = file.read_text()
    assert (
        "### fast" in text
        and "| lrnn_humaneval_bpb | bits_per_byte | lower is better | 0.9876 | 0.0123 | 164 | 0 |" in text
    )
    assert "Computed in bfloat16 on NVIDIA H100, with a context of 2,048 tokens, by lrnn 0.1.0, lm-eval 0.4.13" in text
    write_results(tmp_path, "fast", 0.8765, limit=50)
    write_results(tmp_path, "quick", 0.7654)
    update_card(tmp_path)
    text = file.read_text()
    assert "0.9876" not in text and "0.8765" in text and "0.7654" in text and "Only the first 50 documents" in text
    assert text.count("## Evaluation results") == 1
    for suite in ("fast", "quick"):
        (tmp_path / "eval" / suite / "results.json").unlink()
    update_card(tmp_path)
    assert file.read_text() == card


def test_results_of_lrnn_position_are_named(card, tmp_path):
    (tmp_path / "eval/position").mkdir(parents=True)
    (tmp_path / "eval/position/results.json").write_text('{"models": []}')
    (tmp_path / "eval/position/table.md").write_text("a table")
    update_card(tmp_path)
    assert "See [eval/position/table.md](eval/position/table.md)." in (tmp_path / "README.md").read_text()


def test_a_card_of_another_author_is_left_alone(tmp_path):
    write_results(tmp_path, "fast", 0.5)
    update_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# A model\n")
    update_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# A model\n"


def test_a_damaged_result_does_not_end_an_evaluation(card, tmp_path, capsys):
    write_results(tmp_path, "fast", 0.5)
    (tmp_path / "eval/fast/results.json").write_text('{"metrics": [')
    update_card(tmp_path)
    assert f"the results are not in the model card {tmp_path / 'README.md'}" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == card
