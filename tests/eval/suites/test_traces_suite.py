"""Test the suite `traces`: documents, scores of the gold and of empty-headed answers, files, limits."""

import csv
import hashlib
import json
import random
from collections import Counter
from statistics import mean, stdev

import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from python_answers import answer, split

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval import length_report
from lrnn.eval.offline import go_offline
from lrnn.eval.suites import harness, report, sections
from lrnn.eval.suites.suites import TASK_FOLDER, TRACES
from lrnn.eval.suites.tasks.traces.program_functions import choice_scores, generation_scores
from lrnn.eval.traces import documents as documents_module
from lrnn.eval.traces.documents import DOCUMENTS_PER_LENGTH, LENGTHS, SHOT_ANSWERS, SHOT_LENGTHS, documents
from lrnn.eval.traces.report import CONTROLS, REPORT
from lrnn.traces.formats import FORMATS
from lrnn.traces.training import training_document

FOLDER = TASK_FOLDER / "traces"
METRIC = {"mc": "acc", "gen": "exact_match"}
FEW = (4, 9)  # lengths in most tests
DIGEST = "993ab62c2eb26762081c01d38f2c44d9f648e73fd380c966d7fe55490b01e4e5"


@pytest.fixture(scope="module", autouse=True)
def short_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "LENGTHS", FEW)
        documents.cache_clear()
        yield
    documents.cache_clear()


def half_of(question):
    start, changes, _ = split(question)
    return hashlib.sha256("\n".join([*start, *changes[:4]]).encode()).digest()[0] % 2


@pytest.mark.parametrize("name", FORMATS)
def test_documents(name):
    """Examples are solved, answers follow, balance, halves, and no program of a training document."""
    task, docs = FORMATS[name], documents(name, 0)
    k = len(task.choices)
    (examples,) = {doc["context"].rsplit("\n\n", 1)[0] for doc in docs}
    shown = []
    for example in examples.split("\n\n"):
        question, right = example.rsplit(task.delimiter or "\n", 1)
        question += "" if task.delimiter else "\n"
        assert answer(question, task.choices) == right and half_of(question) == 0
        shown.append((len(split(question)[1]), right))
    assert {length for length, _ in shown} == set(SHOT_LENGTHS) and not set(SHOT_LENGTHS) & set(LENGTHS)
    assert set(Counter(right for _, right in shown).values()) == {len(shown) // k}
    questions = [doc["context"].rsplit("\n\n", 1)[1] for doc in docs]
    assert len(set(questions)) == len(docs) == DOCUMENTS_PER_LENGTH * len(FEW)
    for doc, question in zip(docs, questions, strict=True):
        assert answer(question, doc["choices"]) == doc["choices"][doc["answer"]]
        assert len(split(question)[1]) == doc["length"] and half_of(question) == 1
    for number, length in enumerate(FEW):
        own = docs[number :: len(FEW)]
        assert {doc["length"] for doc in own} == {length}
        assert Counter(doc["answer"] for doc in own) == dict.fromkeys(range(k), DOCUMENTS_PER_LENGTH // k)
        assert max(Counter(doc["answer"] for doc in own[:7]).values()) == -(-7 // k)


def test_no_question_is_in_a_training_document():
    text = "\n\n".join(training_document(number, 9) for number in range(300))
    for name in FORMATS:
        for doc in documents(name, 0):
            assert doc["context"].rsplit("\n\n", 1)[1] not in text


def test_documents_match_the_versions_of_the_task_files():
    made = [documents.__wrapped__(name, 0)[:20] for name in FORMATS]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert digest == DIGEST, "other documents need new versions in the task files"
    assert documents("trace_bits", 1) != documents("trace_bits", 0)
    with pytest.raises(UserError, match=r"unknown kind of program 'trace_bit'; did you mean trace_bits\? valid: trace"):
        documents("trace_bit", 0)


class Python(LM):
    """A model that does what Python does."""

    def answer(self, request):
        return answer(request.args[0].split("\n\n")[-1], request.doc["choices"])

    def generate_until(self, requests):
        return [f" {self.answer(request)}\n\nstate = 0" for request in requests]

    def loglikelihood(self, requests):
        return [(float(request.args[1].strip() == self.answer(request)), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def scored(choose, kind):
    """Return the rows by length and the mean area of every task, for a model whose answer is `choose(document)`."""
    samples = {}
    for name, task in zip(FORMATS, REPORT.task_names[kind], strict=True):
        samples[task] = []
        for doc in documents(name, 0):
            given = choose(doc)
            if kind == "mc":
                scores = choice_scores(doc, [(float(choice == given), False) for choice in doc["choices"]])
            else:
                scores = generation_scores(doc, [f"{given}\n"])
            samples[task].append({"doc": doc, **scores})
    return REPORT.length_rows({"samples": samples}), {
        task: mean(sample["area"] for sample in own) for task, own in samples.items()
    }


@pytest.mark.parametrize("kind", METRIC)
def test_constant_answers_have_the_floor(kind):
    by_length, areas = scored(lambda doc: doc["choices"][1], kind)
    for row in by_length:
        assert row["n"] == DOCUMENTS_PER_LENGTH
        assert row["accuracy"] == row["floor"] == 1 / len(FORMATS[row["task"]].choices)
    assert list(areas.values()) == pytest.approx([0] * len(FORMATS), abs=1e-12)


@pytest.mark.parametrize("control", CONTROLS.values())
def test_controls_are_what_they_score(control):
    by_length, areas = scored(lambda doc: doc[control], "gen")
    for row in by_length:
        assert row["accuracy"] == (row[control] or 0)
        assert (row[control] is None) == (row["task"] == "trace_stack_depth" and control == "last_value")
    known = [area for task, area in areas.items() if control == "initial_value" or "depth" not in task]
    assert max(map(abs, known)) < 0.3 and abs(mean(known)) < 0.06  # the errors are at most 0.09 and 0.02


def test_random_answers_score_zero():
    draw = random.Random(0)
    _, areas = scored(lambda doc: draw.choice(doc["choices"]), "mc")
    assert max(map(abs, areas.values())) < 0.3 and abs(mean(areas.values())) < 0.06


def test_task_files_describe_the_documents():
    assert {path.stem for path in FOLDER.glob("lrnn_*.yaml")} == set(TRACES)
    for kind, tasks in REPORT.task_names.items():
        for name, task in zip(FORMATS, tasks, strict=True):
            config = load_yaml(FOLDER / f"{task}.yaml")
            assert config["task"] == task and config["dataset_kwargs"] == {"name": name, "seed": 0}
            assert config["tag"] == f"traces_{name.removeprefix('trace_')}"
            assert config["metadata"]["shots"] == len(SHOT_ANSWERS[len(FORMATS[name].choices)])
            assert config["target_delimiter"] == FORMATS[name].delimiter
            metrics = [entry["metric"] for entry in config["metric_list"]]
            assert metrics == [METRIC[kind], "area", *(f"{METRIC[kind]}_len{length}" for length in LENGTHS)]
    loaded = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False).load("traces")
    assert set(loaded["tasks"]) == set(TRACES)
    assert {g: set(loaded["group_map"][f"traces_{g}"]) for g in METRIC} == {
        g: set(REPORT.task_names[g]) for g in METRIC
    }


def test_what_python_answers_scores_one(tmp_path, monkeypatch):
    monkeypatch.setattr(length_report, "plot", lambda path, rows, units, controls: path.touch())  # tested below
    go_offline()
    raw = harness.run_tasks(Python(), harness.load_tasks(list(TRACES)), len(FEW))
    rows, by_length = report.metric_rows(raw), sections.length_rows(raw)
    assert {row["metric"] for row in rows} == {"area", *METRIC.values()} and {row["value"] for row in rows} == {1.0}
    scores = [(row["task"], row["metric"], row["value"]) for row in sections.score_rows(rows)]
    assert scores == [("traces_mc", "area", 1.0), ("traces_gen", "area", 1.0)]
    assert [(row["task"], row["kind"], row["length"], row["accuracy"], row["n"]) for row in by_length] == [
        (name, kind, length, 1.0, 1) for kind in METRIC for name in FORMATS for length in FEW
    ]
    sections.write(tmp_path, by_length)
    with (tmp_path / "by_length.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in written] == [row["accuracy"] for row in by_length]
    assert {row["last_value"] for row in written if row["task"] == "trace_stack_depth"} == {""}
    assert (tmp_path / "by_length.png").exists()
    table = sections.markdown_tables(by_length)
    assert "| task | length in | floor | last value | initial value | 4 | 9 |" in table and "area under" in table
    assert "| trace_stack_depth | lines | 1.000 | none | " in table


def test_plot(tmp_path):
    rows, _ = scored(lambda doc: doc["choices"][0], "gen")
    own = [row for row in rows if row["task"] == "trace_stack_depth"]
    REPORT.write(tmp_path, own, "of_one")
    assert (tmp_path / "of_one.png").read_bytes()[1:4] == b"PNG"


def test_area_is_the_mean_over_lengths_of_scaled_accuracy(tiny_model):
    """A real model, and the numbers of lm-eval. The answer of a session is on a line of its own."""
    names = ["lrnn_trace_repl_4_mc", "lrnn_trace_repl_4_gen"]
    go_offline()
    lm, _ = harness.load_model(tiny_model, ["cpu"], "float32", 8, 4096, "never")
    raw = harness.run_tasks(lm, harness.load_tasks(names), 4)
    rows = {(row["task"], row["metric"]): row for row in report.metric_rows(raw)}
    for task in names:
        scores = [row["scaled_accuracy"] for row in REPORT.length_rows(raw) if f"trace_repl_4_{row['kind']}" in task]
        assert rows[task, "area"]["value"] == pytest.approx(mean(scores)) and len(scores) == len(FEW)
        areas = [sample["area"] for sample in raw["samples"][task]]
        assert rows[task, "area"]["stderr"] == pytest.approx(stdev(areas) / len(areas) ** 0.5)
    sample = raw["samples"][names[0]][3]
    prompt = lm.tokenizer(sample["doc"]["context"])["input_ids"]
    assert lm.tokenizer.decode(prompt).endswith(")\n")
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    (zero,) = lm.tokenizer("0")["input_ids"]
    for choice, (given,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
        (token,) = lm.tokenizer(choice)["input_ids"]
        newline = float(given[0]) - logits[token].item()  # which is a part of every choice
        assert newline == pytest.approx(float(sample["resps"][0][0][0]) - logits[zero].item(), abs=1e-3)


def test_a_prompt_that_does_not_fit_is_refused(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    options = ["--suite", "traces", "--limit", 2, "--max-length", 100, "--out", tmp_path / "out"]
    assert cli.main(["eval", *map(str, [tiny_model, *options])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has prompts with answers of up to" in line and "give --max-length" in line and "lrnn_trace_" in line
