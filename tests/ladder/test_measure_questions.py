"""Test the questions that a ladder asks a model: against `lrnn eval`, and against log-likelihoods in float64."""

import hashlib
import json

import numpy as np
import pytest
from ladder_models import true_log_likelihoods, true_model, write_export
from transformers import AutoTokenizer

from lrnn.eval.retrieval import needles, pairs
from lrnn.eval.suites import fetch_data
from lrnn.eval.suites.evaluate import evaluate
from lrnn.eval.suites.request import Request
from lrnn.eval.traces import documents as traces
from lrnn.ladder.measure import questions
from lrnn.ladder.measure.measure import measure
from lrnn.ladder.measure.settings import MeasureConfig
from lrnn.settings import validate

GOLD = [("def f(x):\n", "    return x\n"), ("a naïve ", "café"), ("1 + 1 = ", "2")]
SETTINGS = {
    "gold": ["humaneval"],
    "traces": {"formats": ["trace_bits", "trace_s3"], "documents": 4, "longest": 8},
    "recall": {"documents": 3, "longest": 8},
    "needles": {"forms": ["multikey_2"], "documents": 2, "longest": 1024},
    "eigenvalue_steps": 0,
    "batch_tokens": 2000,
}
START = {"event": "start", "step": 0, "processes": 1, "resumed": False, "time": "2026-11-29T10:00:00+00:00"}


@pytest.fixture(scope="module")
def fewer():
    """Let tasks have few documents, none of them long, so that `lrnn eval` can ask all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "LENGTHS", (4, 8, 16))
        patch.setattr(traces, "DOCUMENTS_PER_LENGTH", 6)
        patch.setattr(pairs, "PAIRS", (4, 8, 16))
        patch.setattr(pairs, "DOCUMENTS_PER_SIZE", 4)
        patch.setattr(needles, "DOCUMENTS_PER_LENGTH", 3)
        traces.documents.cache_clear()
        yield
        traces.documents.cache_clear()


@pytest.fixture(scope="module")
def export(fewer, tmp_path_factory):
    """A model, with benchmark data of three documents."""
    folder = tmp_path_factory.mktemp("export")
    rows = [{"context": context, "question": context, "continuation": answer} for context, answer in GOLD]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "data").mkdir()
    (folder / "data" / "humaneval_gold.jsonl").write_bytes(data)
    entry = {"rows": 3, "sha256": hashlib.sha256(data).hexdigest(), "licence": "", "source": ""}
    manifest = {"version": fetch_data.MANIFEST_VERSION, "files": {"humaneval_gold.jsonl": entry}}
    (folder / "data" / fetch_data.MANIFEST).write_text(json.dumps(manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LRNN_EVAL_DATA", str(folder / "data"))
        yield write_export(folder)


def take(export, run, **changes):
    (run / "metrics.jsonl").write_text(json.dumps(START) + "\n")
    figures, documents = measure(run, export, validate(SETTINGS | changes, "test", MeasureConfig), "cpu", print)
    return {(figure.measure, figure.of, figure.at): figure for figure in figures}, documents


@pytest.fixture(scope="module")
def measured(export, tmp_path_factory):
    return take(export, tmp_path_factory.mktemp("run"))


def test_the_numbers_are_those_of_lrnn_eval(export, measured, tmp_path):
    tasks = ("lrnn_humaneval_bpb", "lrnn_trace_bits_mc", "lrnn_trace_s3_mc")
    results = evaluate(Request(model=export, tasks=tasks, out=tmp_path / "out", device="cpu", max_length=4096))
    figures, documents = measured
    gold = next(row for row in results["metrics"] if row["metric"] == "bits_per_byte")
    assert figures["gold_bits_per_byte", "humaneval", None].value == pytest.approx(gold["value"], rel=1e-5)
    lines = {
        task: [json.loads(line) for path in (tmp_path / "out").rglob(f"*{task}*.jsonl") for line in path.open()]
        for task in tasks
    }
    for of in ("bits", "s3"):
        for length in (4, 8):
            theirs = [row["acc"] for row in lines[f"lrnn_trace_{of}_mc"] if row["doc"]["length"] == length]
            ours = documents[f"traces_accuracy/{of}/{length}"]
            assert len(theirs) == 6 and ours.tolist() == theirs[:4]
    assert ("traces_accuracy", "bits", 16) not in figures  # longer than asked for
    everything = documents["traces_accuracy/all/8"]
    assert everything.tolist() == [x for of in ("bits", "s3") for x in documents[f"traces_accuracy/{of}/8"]]


def test_choices_against_float64(export, measured):
    _, documents = measured
    tokenizer, model = AutoTokenizer.from_pretrained(export), true_model(export)
    for length in (4, 8):
        expected = []
        for doc in [doc for doc in traces.documents("trace_s3", 0) if doc["length"] == length][:4]:
            head = len(tokenizer(doc["context"], add_special_tokens=False)["input_ids"])
            scores = []
            for choice in doc["choices"]:
                ids = tokenizer(f"{doc['context']} {choice}", add_special_tokens=False)["input_ids"]
                scores.append(true_log_likelihoods(model, [tokenizer.bos_token_id, *ids])[head:].sum().item())
            expected.append(float(np.argmax(scores) == doc["answer"]))
        assert documents[f"traces_accuracy/s3/{length}"].tolist() == expected


def test_right_answers_of_recall_and_needles_against_float64(export, measured):
    _, documents = measured
    tokenizer, model = AutoTokenizer.from_pretrained(export), true_model(export)

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = {
        "recall_bits_per_byte/pairs/8": [
            (doc["context"], doc["answers"][0]) for doc in pairs.documents(count, 10**6) if doc["length"] == 8
        ][:3],
        "needle_bits_per_byte/multikey_2/1024": [
            (doc["context"], doc["answer"]) for doc in needles.documents("multikey_2", count, 1024, None)
        ][:2],
    }
    for key, questions_asked in asked.items():
        expected = []
        for context, answer in questions_asked:
            ids = tokenizer(f"{context} {answer}", add_special_tokens=False)["input_ids"]
            losses = true_log_likelihoods(model, [tokenizer.bos_token_id, *ids])[count(context) :]
            expected.append([losses.sum().item(), len(answer) + 1])
        np.testing.assert_allclose(documents[key], expected, rtol=1e-4)


def _other_value(doc) -> str:
    return next(value for value in doc["values"] if value != doc["answers"][0])


def test_generated_answers_are_scored(export, tmp_path, monkeypatch):
    """Every second question is answered rightly, in more words than the answer."""
    docs = pairs.documents(len, 10**6)
    # The other values answer with that of another key.
    right = {
        doc["context"]: f" {doc['answers'][0] if i % 2 else _other_value(doc)} it is" for i, doc in enumerate(docs)
    }
    compute = questions.answer

    def answer(model, kind, texts):
        return [right[text] for text, _ in texts] if kind == "generate_until" else compute(model, kind, texts)

    monkeypatch.setattr(questions, "answer", answer)
    figures, documents = take(export, tmp_path, gold=[], traces=None, needles=None)
    for length in (4, 8):
        numbers = [i for i, doc in enumerate(docs) if doc["length"] == length][:3]
        assert documents[f"recall_accuracy/pairs/{length}"].tolist() == [float(i % 2) for i in numbers]
        assert figures["recall_accuracy", "pairs", length].value == pytest.approx(np.mean([i % 2 for i in numbers]))


def test_batches_hold_as_many_tokens_as_fit(export, monkeypatch, tmp_path):
    sizes, read = [], questions.Model._model_call

    def call(self, inputs, *rest, **options):
        sizes.append(tuple(inputs.shape))
        return read(self, inputs, *rest, **options)

    monkeypatch.setattr(questions.Model, "_model_call", call)
    take(export, tmp_path, gold=[], needles=None, recall=None, batch_tokens=3000)
    assert max(rows * length for rows, length in sizes) <= 3000 + max(length for _, length in sizes)
    assert max(rows for rows, _ in sizes) > 1
