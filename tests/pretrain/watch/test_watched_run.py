"""Test runs that are evaluated while they train: training notices nothing, and scores are those of `lrnn eval`.

The long form, which runs with LRNN_TORTURE=1, adds generated answers, ZeRO-3, one process, and a rank that fails.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from training_group import losses, run_group

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.eval.in_run import tasks
from lrnn.eval.suites import hub_data
from lrnn.eval.suites.request import Request
from lrnn.records import events_by_step, read_metrics

LONG = os.environ.get("LRNN_TORTURE") == "1"
long = pytest.mark.skipif(not LONG, reason="takes a minute: set LRNN_TORTURE=1")
TASKS = ["lrnn_parity_mc", *(["lrnn_parity_gen"] if LONG else [])]
PROMPTS = ["def f(x):", "import", "# naïve"]
WATCHED = {
    "eval": {"every": 3, "tasks": TASKS, "limit": 33, "max_length": 2048},  # two chunks of requests
    "samples": {"every": 2, "prompts": PROMPTS, "max_new_tokens": 8},
}


def events(run_dir, event):
    """Return the steps of an event in the order of the lines."""
    return [record["step"] for record in read_metrics(Path(run_dir)) if record.get("event") == event]


def scores(run_dir):
    """Return the scores of each step."""
    return {step: (e["scores"], e["stderr"]) for step, e in events_by_step(read_metrics(run_dir), "eval").items()}


def samples(run_dir):
    """Return step, prompt and text of every sample."""
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt"], row["text"]) for row in rows]


def without_last(run_dir, copy):
    """Copy the folder of a finished run as if it had ended before it was evaluated at its last step."""
    shutil.copytree(run_dir, copy)
    lines = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if '"step": 6' not in line]
    (copy / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return copy


@pytest.fixture(scope="module")
def make(config_in, tmp_path_factory):
    """`make(run, stage)` returns the configuration of a run of this module."""
    folder = tmp_path_factory.mktemp("runs")
    return lambda run, stage=2, **changes: config_in(
        folder, run, stage, checkpoint={"every": 3, "keep_last": 10}, **changes
    )


@pytest.fixture(scope="module")
def runs(make, tmp_path_factory):
    """Return the folder of two runs by two processes: plain, and watched, which is stopped after step 3 and resumed."""
    watched = {"config": make("watched", **WATCHED)}
    specs = [{"config": make("plain")}, {**watched, "stop_at": 3}, watched]
    assert run_group(tmp_path_factory.mktemp("specs"), specs) == [0, 75, 0]
    return Path(watched["config"]["run_dir"]).parent


@pytest.fixture(scope="module")
def others(runs, make, tmp_path_factory):
    """Return `runs` with the long form's: never stopped, failing, and the last evaluation under other conditions."""
    specs = [{"config": make("whole", **WATCHED)}, {"config": make("failing", **WATCHED), "evaluation_fails_at": 3}]
    assert run_group(tmp_path_factory.mktemp("specs"), specs) == [0, 0]
    for run, stage, processes in (("stage3", 3, 2), ("alone", 2, 1)):
        without_last(runs / "watched", runs / run)
        spec = {"config": make(run, stage, **WATCHED)}
        assert run_group(tmp_path_factory.mktemp("specs"), [spec], processes) == [0]
    return runs


def test_training_computes_the_same_bits(runs, base):
    plain = losses(base(run_dir=str(runs / "plain")))
    assert len(plain) == 6 and losses(base(run_dir=str(runs / "watched"))) == plain


def test_what_is_due_is_found_once(runs):
    """The signal of step 3 comes before its evaluation, which the run that resumes makes."""
    assert events(runs / "watched", "eval") == [3, 6] and events(runs / "watched", "samples") == [2, 4, 6]
    found = [(step, prompt) for step, prompt, _ in samples(runs / "watched")]
    assert found == [(step, prompt) for step in (2, 4, 6) for prompt in PROMPTS]


def test_scores_are_those_of_the_exported_checkpoint(runs, tmp_path):
    assert main(["export", str(runs / "watched" / "checkpoints" / "step-00000006"), str(tmp_path / "hf")]) == 0
    _check_samples(tmp_path / "hf", samples(runs / "watched")[-3:])
    command = ["eval", str(tmp_path / "hf"), "--tasks", *TASKS, "--limit", "33", "--max-length", "2048", "--out"]
    assert main([*command, str(tmp_path / "out"), "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert len(rows) >= 2
    for found, column in zip(scores(runs / "watched")[6], ("value", "stderr"), strict=True):
        flat = {(task, metric): value for task, metrics in found.items() for metric, value in metrics.items()}
        assert flat == {(row["task"], row["metric"]): row[column] for row in rows if row[column] is not None}


def _check_samples(folder, found):
    """Compare samples with what transformers generates with an export."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for _, prompt, text in found:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt).input_ids]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_messages_name_keys_of_the_run():
    said = "give --max-length 2048, or --truncate to cut 3; run `lrnn eval --fetch --suite x`"
    meant = "give eval.max_length 2048, or eval.truncate to cut 3; run `lrnn eval --fetch --suite x`"
    assert tasks.as_keys(said) == meant


def test_a_suite_without_its_data(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_data, "_is_there", lambda name: False)
    request = Request(model=tmp_path, suite="commonsense")
    with pytest.raises(UserError, match=r"data sets .* allenai/sciq \(lrnn_sciq\); run `lrnn eval --fetch --suite"):
        tasks._load(request, 64)


@long
def test_a_resume_changes_no_score(others):
    assert scores(others / "whole") == scores(others / "watched")
    assert samples(others / "whole") == samples(others / "watched")


@long
def test_the_number_of_processes_and_the_stage_change_nothing(others):
    for run in ("stage3", "alone"):
        assert scores(others / run)[6] == scores(others / "watched")[6]
        assert samples(others / run)[-3:] == samples(others / "watched")[-3:]


@long
def test_a_rank_that_fails_costs_a_warning(others, base):
    failures = [r for r in read_metrics(others / "failing") if r.get("event") == "eval_failed"]
    assert [(f["step"], f["what"]) for f in failures] == [(3, "scores")]
    assert failures[0]["error"] == "rank 1: ValueError: no answer today"
    assert events(others / "failing", "eval") == [6]
    assert scores(others / "failing")[6] == scores(others / "watched")[6]
    assert losses(base(run_dir=str(others / "failing"))) == losses(base(run_dir=str(others / "plain")))
