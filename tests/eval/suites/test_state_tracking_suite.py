"""Test the suite `state_tracking` through lm-eval: a solver scores 1, a constant has the floor; files; limits."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from text_solvers import solve
from tiny_models import write_tiny_model

from lrnn import LrnnConfig, LrnnForCausalLM, cli
from lrnn.eval.model_folder import check_export
from lrnn.eval.offline import go_offline
from lrnn.eval.state_tracking import documents as documents_module
from lrnn.eval.state_tracking.documents import LENGTHS, SHOT_ANSWERS, documents
from lrnn.eval.state_tracking.report import REPORT as text_report
from lrnn.eval.state_tracking.tasks import TEXT_TASKS
from lrnn.eval.suites import harness, report
from lrnn.eval.suites.collect import collect
from lrnn.eval.suites.compare import compare
from lrnn.eval.suites.suites import STATE_TRACKING, TASK_FOLDER

FOLDER = TASK_FOLDER / "state_tracking"
METRIC = {"mc": "acc", "gen": "exact_match"}
DOCUMENTS_PER_LENGTH = 30  # a multiple of 2, 3 and 5, the numbers of choices
LIMIT = 7  # one document per length
TORTURE = os.environ.get("LRNN_TORTURE") == "1"  # the long form of the test of plain lm-eval


@pytest.fixture(scope="module", autouse=True)
def few_documents():
    """Leave out three of four documents. The others are those that come first, and are balanced like all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "DOCUMENTS_PER_LENGTH", DOCUMENTS_PER_LENGTH)
        documents.cache_clear()
        yield
    documents.cache_clear()


class Solver(LM):
    """A model that knows only the prompt's text, and does what it says."""

    def answer(self, request):
        (name,) = (name for name in TEXT_TASKS if request.task_name.removeprefix("lrnn_").rsplit("_", 1)[0] == name)
        return solve(name, request.args[0])[0]

    def generate_until(self, requests):
        return [f" {self.answer(request)}\n\nBits: 0" for request in requests]

    def loglikelihood(self, requests):
        return [(0.0 if request.args[1] == f" {self.answer(request)}" else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


class Constant(Solver):
    """A model that always gives the second choice."""

    def answer(self, request):
        return request.doc["choices"][1]


class Indifferent(Solver):
    def loglikelihood(self, requests):
        return [(-1.0, False) for _ in requests]

    def generate_until(self, requests):
        return ["" for _ in requests]


@pytest.fixture(scope="module")
def run():
    """Return rows by length and metric rows of some tasks, from a model's answers to their first documents."""

    def run_(model, tasks, limit=None):
        go_offline()
        harness.silence_expected_warnings()
        raw = harness.run_tasks(model, harness.load_tasks(list(tasks)), limit)
        return text_report.length_rows(raw), report.metric_rows(raw), raw

    return run_


@pytest.mark.parametrize("kind", METRIC)
def test_a_solver_of_the_text_scores_one_everywhere(run, kind):
    by_length, rows, raw = run(Solver(), text_report.task_names[kind], limit=70)
    assert [(row["task"], row["length"]) for row in by_length] == [(t, n) for t in TEXT_TASKS for n in LENGTHS]
    assert {(row["accuracy"], row["scaled_accuracy"], row["n"]) for row in by_length} == {(1.0, 1.0, 10)}
    assert {row["metric"] for row in rows} == {METRIC[kind], f"scaled_{METRIC[kind]}"}
    assert all(row["value"] == 1.0 for row in rows)
    (score,) = text_report.score_rows(rows)
    assert score["value"] == 1.0 and score["task"] == f"state_tracking_{kind}"
    for task in text_report.task_names[kind]:  # these are what plain lm-eval shows
        for length in LENGTHS:
            assert raw["results"][task][f"{METRIC[kind]}_len{length},none"] == 1.0


@pytest.mark.parametrize("kind", METRIC)
def test_a_constant_answer_has_the_floor_which_is_chance(run, kind):
    by_length, rows, _ = run(Constant(), text_report.task_names[kind])
    for row in by_length:
        chance = 1 / len(TEXT_TASKS[row["task"]].choices)
        assert row["n"] == DOCUMENTS_PER_LENGTH and row["accuracy"] == row["floor"] == chance
        assert row["scaled_accuracy"] == pytest.approx(0, abs=1e-12)
    assert text_report.score_rows(rows)[0]["value"] == pytest.approx(0, abs=1e-12)


def test_without_a_preference_the_first_choice_is_taken_and_silence_is_wrong(run):
    by_length, _, _ = run(Indifferent(), ["lrnn_s3_mc", "lrnn_s3_gen"], limit=21)
    assert [row["accuracy"] for row in by_length] == [1 / 3] * len(LENGTHS) + [0.0] * len(LENGTHS)


def test_errors_by_length_equal_lm_evals(run):
    by_length, _, raw = run(Constant(), ["lrnn_s5_mc"], limit=70)
    for row in by_length:
        result = raw["results"]["lrnn_s5_mc"]
        assert row["accuracy"] == result[f"acc_len{row['length']},none"]
        assert row["stderr"] == pytest.approx(result[f"acc_len{row['length']}_stderr,none"])


def test_task_files_describe_the_documents():
    assert {path.stem for path in FOLDER.glob("lrnn_*.yaml")} == set(STATE_TRACKING)
    for kind, tasks in text_report.task_names.items():
        for name, task in zip(TEXT_TASKS, tasks, strict=True):
            config = load_yaml(FOLDER / f"{task}.yaml")
            assert config["task"] == task and config["dataset_kwargs"] == {"name": name}
            assert config["tag"] == f"state_tracking_{name}"
            assert config["metadata"]["shots"] == len(SHOT_ANSWERS[len(TEXT_TASKS[name].choices)])
            metrics = [entry["metric"] for entry in config["metric_list"]]
            by_length = [f"{METRIC[kind]}_len{length}" for length in LENGTHS]
            assert metrics == [METRIC[kind], f"scaled_{METRIC[kind]}", *by_length]
            assert config["output_type"] == {"mc": "multiple_choice", "gen": "generate_until"}[kind]
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False)
    loaded = manager.load("state_tracking")
    assert set(loaded["tasks"]) == set(STATE_TRACKING)
    assert {g: set(loaded["group_map"][f"state_tracking_{g}"]) for g in METRIC} == {
        g: set(text_report.task_names[g]) for g in METRIC
    }
    assert set(manager.load("state_tracking_s5")["tasks"]) == {"lrnn_s5_mc", "lrnn_s5_gen"}


@pytest.fixture(scope="module")
def question_model(tmp_path_factory):
    """Return the folder of a random model whose tokenizer makes few tokens of the questions."""
    texts = [document["context"] for name in TEXT_TASKS for document in documents(name)[:LIMIT]]
    return write_tiny_model(tmp_path_factory.mktemp("model"), texts, vocab_size=1500, sentences=True)


@pytest.fixture(scope="module")
def evaluated(question_model, tmp_path_factory):
    """`evaluated(suite, *options)` returns the result folder of a suite, written by the command line."""

    def evaluate(suite, *options):
        out = tmp_path_factory.mktemp("results") / suite
        options = ["--suite", suite, "--limit", LIMIT, "--device", "cpu", "--out", out, *options]
        assert cli.main(["eval", str(question_model), *map(str, options)]) == 0
        return out

    return evaluate


@pytest.fixture(scope="module")
def results(evaluated):
    return evaluated("state_tracking")


def test_result_folder(results):
    found = json.loads((results / "results.json").read_text())
    scores = {row["task"]: row for row in found["metrics"][:2]}
    assert list(scores) == ["state_tracking_mc", "state_tracking_gen"]
    assert [row["task"] for row in found["metrics"][2::2]] == list(STATE_TRACKING)
    assert scores["state_tracking_mc"]["n"] == 10 * LIMIT and scores["state_tracking_mc"]["stderr"] > 0
    assert len(found["by_length"]) == 2 * 10 * len(LENGTHS)
    with (results / "by_length.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in found["by_length"]]
    table = (results / "table.md").read_text()
    assert "| state_tracking_mc | scaled_acc | higher is better |" in table and "| program | lines |" in table
    assert "Only the first 7 documents" in table
    assert (results / "by_length.png").read_bytes()[1:4] == b"PNG"
    for task in STATE_TRACKING:
        samples = [json.loads(line) for line in (results / f"samples_{task}.jsonl").read_text().splitlines()]
        assert [sample["doc"]["length"] for sample in samples] == list(LENGTHS)


def test_scores_are_collected_and_compared(results):
    table = collect([results])
    assert "state_tracking_mc scaled_acc, first 7" in table and "_len" not in table
    rows = {line.split(" | ")[0].strip("| "): line for line in compare(results, results).splitlines()[2:]}
    value = json.loads((results / "results.json").read_text())["metrics"][0]["value"]
    assert f"| {value:.4f} | {value:.4f} | +0.0000 | [+0.0000, +0.0000] | {10 * LIMIT} |" in rows["state_tracking_mc"]
    assert set(rows) == {"state_tracking_mc", "state_tracking_gen", *STATE_TRACKING}


def test_compare_takes_the_mean_over_tasks_from_their_documents(results, tmp_path, run):
    other = tmp_path / "other"
    _, rows, raw = run(Solver(), STATE_TRACKING, limit=LIMIT)
    other.mkdir()
    (other / "results.json").write_text(json.dumps({"metrics": text_report.score_rows(rows)}))
    for task, samples in raw["samples"].items():
        (other / f"samples_{task}.jsonl").write_text("".join(json.dumps(s, default=str) + "\n" for s in samples))
    score = json.loads((results / "results.json").read_text())["metrics"][0]["value"]
    line = compare(results, other).splitlines()[2]
    assert line.startswith(f"| state_tracking_mc | scaled_acc | {score:.4f} | 1.0000 | {1 - score:+.4f} |")


# The command of lm-eval without its own 12,000 task files, which take 20 s to read.
WITHOUT_ITS_TASKS = """
from functools import partialmethod
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
cli_evaluate()
"""
BPB_TASKS = ("lrnn_humaneval_bpb_0shot", "lrnn_heldout_bpb")


@pytest.fixture(scope="module")
def theirs(question_model, heldout, eval_data, tmp_path_factory):
    """Return what plain lm-eval writes for some tasks of both suites, in a process of its own."""
    folder = tmp_path_factory.mktemp("lm_eval")
    model_args = f"pretrained={question_model},trust_remote_code=True,dtype=float32,softmax_dtype=float32"
    tasks = ",".join(["state_tracking_mc", *BPB_TASKS])
    start = ["-m", "lm_eval"] if TORTURE else ["-c", WITHOUT_ITS_TASKS]
    command = [sys.executable, *start, "run", "--model", "hf", "--model_args", f"{model_args},max_length=2048"]
    command += ["--tasks", tasks, "--include_path", TASK_FOLDER, "--limit", LIMIT, "--batch_size", 8]
    command += ["--device", "cpu", "--output_path", folder / "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    environment = {**os.environ, **offline, "LRNN_EVAL_HELDOUT": str(heldout)}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    return json.loads(file.read_text())


def test_plain_lm_eval_gives_the_same_score(results, theirs):
    ours = json.loads((results / "results.json").read_text())
    score = ours["metrics"][0]
    group = theirs["groups"]["state_tracking_mc"]
    assert group["scaled_acc,none"] == pytest.approx(score["value"], abs=1e-9)
    assert group["scaled_acc_stderr,none"] == pytest.approx(score["stderr"])
    for row in ours["by_length"]:
        if row["kind"] == "mc":
            name = f"acc_len{row['length']},none"
            assert theirs["results"][f"lrnn_{row['task']}_mc"][name] == row["accuracy"]


def test_plain_lm_eval_gives_the_same_bits_per_byte(evaluated, heldout, theirs):
    ours = json.loads((evaluated("quick", "--heldout", heldout) / "results.json").read_text())
    rows = {row["task"]: row for row in ours["metrics"]}
    for task in BPB_TASKS:
        assert theirs["results"][task]["bits_per_byte,none"] == pytest.approx(rows[task]["value"], rel=1e-6)


def test_a_prompt_that_does_not_fit_is_refused_with_the_length_that_fits(tiny_model, tmp_path, capsys, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    options = ["--suite", "state_tracking", "--limit", 7, "--out", tmp_path / "out"]
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 2  # of 2048 tokens
    (line,) = capsys.readouterr().err.strip().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [document["context"] for document in documents("s5")[:7]]
    needed = max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) + 8
    assert f"lrnn_s5_gen has prompts with answers of up to {needed} tokens" in line
    assert f"give --max-length {needed}" in line
    monkeypatch.setattr(harness, "load_model", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["eval", str(tiny_model), *map(str, options), "--max-length", str(needed)])
    # With one token less in the context lm-eval would cut the prompt.
    assert cli.main(["eval", str(tiny_model), *map(str, options), "--max-length", str(needed - 1)]) == 2


def test_a_linear_rnn_reads_the_whole_prompt(tiny_model, tmp_path, run):
    folder = tmp_path / "linear"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("model*", "config.json", "generation*", "eval"))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48}
    tokens = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    LrnnForCausalLM(LrnnConfig(vocab_size=tokens, max_position_embeddings=64, **size)).save_pretrained(folder)
    check_export(folder)
    lm, _ = harness.load_model(folder, ["cpu"], "float32", 4, 2048, "never")
    by_length, _, raw = run(lm, ["lrnn_even_pairs_mc", "lrnn_even_pairs_gen"], limit=LIMIT)
    assert [row["length"] for row in by_length] == 2 * list(LENGTHS)
    longest = raw["samples"]["lrnn_even_pairs_mc"][-1]
    for number, choice in enumerate(longest["doc"]["choices"]):
        prompt = lm.tokenizer(longest["doc"]["context"])["input_ids"]
        answer = lm.tokenizer(f" {choice}")["input_ids"]
        with torch.no_grad():
            logp = lm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        wanted = sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
        assert len(prompt) > 500 and float(longest["resps"][number][0][0]) == pytest.approx(wanted, abs=1e-3)
