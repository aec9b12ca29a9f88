"""Test the suite `needle`: documents of the wanted length, depth and wording; scores of oracles; haystacks; errors."""

import csv
import json
import re
from functools import cache
from statistics import mean

import pytest
from fake_lms import First, Gold
from lm_eval.tasks._yaml_loader import load_yaml
from torch.utils import collect_env

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.offline import go_offline
from lrnn.eval.retrieval import haystack, needles
from lrnn.eval.retrieval import report as retrieval_report
from lrnn.eval.retrieval.tokens import context_length, tokenizer_of
from lrnn.eval.suites import harness, report
from lrnn.eval.suites.suites import NEEDLES, TASK_FOLDER

FOLDER = TASK_FOLDER / "needle"


def words(text):
    return len(text.split())


@pytest.fixture(autouse=True)
def few_documents(monkeypatch):
    monkeypatch.setattr(needles, "DOCUMENTS_PER_LENGTH", 8)
    monkeypatch.setattr(collect_env, "get_pretty_env_info", cache(lambda: ""))  # it starts pip


@pytest.mark.parametrize("form", needles.FORMS)
def test_documents_fill_the_length_and_say_the_value_once(form):
    docs = needles.documents(form, words, 4100, None)
    assert [doc["length"] for doc in docs] == 8 * [1024, 2048, 4096]
    longest = max(map(words, haystack.sentences(None))) if form == "single_2" else 20
    for number, doc in enumerate(docs):
        used = words(doc["context"]) + needles.GENERATED_TOKENS + 1
        assert doc["length"] - longest < used <= doc["length"]
        needle = re.search(rf"One of the special magic {doc['kind']}s for (\S+) is: {doc['answer']}\.", doc["context"])
        key = needle[1]
        assert doc["context"].count(doc["answer"]) == 1
        assert doc["context"].endswith(f"The special magic {doc['kind']} for {key} mentioned in the provided text is")
        depth = number // 3 * needles.STRIDE % needles.DEPTHS / (needles.DEPTHS - 1)
        text = doc["context"].split("\n", 1)[1].rsplit("\n", 1)[0]
        assert abs(text.index(needle[0]) / (len(text) - len(needle[0])) - depth) < 0.04
        assert abs(doc["third"] - 3 * depth) <= 1 + 1e-9 and (doc["third"] == 0) == (depth < 0.34)
    needle_counts = [doc["context"].count("One of the special magic") for doc in docs[:3]]
    wanted = {"multikey_1": [4, 4, 4], "multikey_2": "more", "multikey_3": "more"}.get(form, [1, 1, 1])
    assert needle_counts == wanted or (wanted == "more" and needle_counts[0] > 40 and needle_counts[2] > 200)
    assert docs == needles.documents(form, words, 4100, None), "the same in every run"
    assert len({doc["answer"] for doc in docs}) == len(docs)


def test_the_wording_is_rulers():
    (doc, *_) = needles.documents("single_1", words, 1024, None)
    head, first, *noise, question = doc["context"].split("\n")
    # lm_eval/tasks/ruler/niah_utils.py and niah_single_1.yaml, in the singular.
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards."
    )
    key = re.fullmatch(r"One of the special magic numbers for (\w+-\w+) is: \d{7}\.", first)[1]
    assert question == (
        f"What is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is"
    )
    assert set(noise) == {"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."}


def load(model, names=NEEDLES, **metadata):
    go_offline()
    harness.silence_expected_warnings()
    return harness.load_tasks(list(names), metadata={"pretrained": str(model), "max_length": 2048, **metadata})


class WrongNumber(First):
    def text(self, request):
        return "1234567 or 01234567-89ab-4def-8123-456789abcdef"


class RightHalf(Gold):
    """Answer rightly where the needle is in the last third, wrongly in the first, and nothing between."""

    def text(self, request):
        return [WrongNumber.text(self, request), "nothing", super().text(request)][request.doc["third"]]


@pytest.mark.parametrize(
    ("model", "right", "answered", "given"), [(Gold, 1, 1, 1), (First, 0, 0, None), (WrongNumber, 0, 1, 0)]
)
def test_oracles(tiny_model, model, right, answered, given):
    loaded = load(tiny_model, NEEDLES if model is Gold else ("lrnn_needle_single_3", "lrnn_needle_multikey_2"))
    tasks = loaded.tasks
    raw = harness.run_tasks(model(tasks), loaded, limit=4)
    rows = {(row["task"], row["metric"]): row["value"] for row in report.metric_rows(raw)}
    wanted = {"contains": right, "answered": answered, "given_answered": given or 0}
    assert rows == {(task, metric): value for task in tasks for metric, value in wanted.items()}
    by_length = retrieval_report.length_rows(raw)
    assert [(row["task"], row["length"], row["n"]) for row in by_length] == [
        (t, n, 2) for t in tasks for n in (1024, 2048)
    ]
    assert {(row["accuracy"], row["answered"], row["given_answered"]) for row in by_length} == {
        (right, answered, given)
    }
    assert all(raw["results"][task]["contains_1024,none"] == right for task in tasks)  # what plain lm-eval shows


def test_rows_by_length_by_hand(tiny_model, tmp_path):
    loaded = load(tiny_model, ("lrnn_needle_single_2",))
    raw = harness.run_tasks(RightHalf(loaded.tasks), loaded)
    thirds = [0, 1, 2, 0, 2, 0, 1, 2]  # of depths 0, 17, 34, 11, 28, 5, 22 and 39 of 39
    first, second = retrieval_report.length_rows(raw)
    assert (first["length"], second["length"]) == (1024, 2048)
    for row in (first, second):
        assert row["accuracy"] == 3 / 8 and row["answered"] == 6 / 8 and row["given_answered"] == 0.5
        assert [row[name] for name in retrieval_report.THIRDS] == [0, 0, 1] and row["n"] == len(thirds)
        assert row["stderr"] == pytest.approx((3 / 8 * 5 / 8 / 7) ** 0.5)
    (given,) = (row for row in report.metric_rows(raw) if row["metric"] == "given_answered")
    assert given["value"] == 0.5 and 0.1 < given["stderr"] < 0.2  # of 12 answers: 0.14
    retrieval_report.write(tmp_path, [first, second], "by_length")
    with (tmp_path / "by_length.csv").open() as file:
        assert mean(float(row["accuracy"]) for row in csv.DictReader(file)) == 3 / 8
    assert (tmp_path / "by_length.png").read_bytes()[1:4] == b"PNG"
    table = retrieval_report.markdown_table([first])
    assert (
        "| lrnn_needle_single_2 | tokens | 1024 | 8 | 0.375 | 0.183 | 0.750 | 0.500 | 0.000 | 0.000 | 1.000 |" in table
    )


def test_the_haystack_is_a_file_or_generated(tmp_path, monkeypatch):
    text = " ".join(f"Sentence {n} ends here." for n in range(300)) + " A line without an end"
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split(". ")))
    found = haystack.sentences(str(tmp_path / "book.txt"))
    assert found == tuple(f"Sentence {n} ends here." for n in range(300))
    (doc, *_) = needles.documents("single_2", words, 1024, str(tmp_path / "book.txt"))
    assert re.search(r"Sentence \d+ ends here\. Sentence \d+ ends here\.", doc["context"])
    with pytest.raises(UserError, match=r"rows\.jsonl has 0 sentences of at most 400 characters"):
        haystack.sentences(str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="haystack file not found: /nowhere"):
        haystack.sentences("/nowhere")
    (tmp_path / "rows.txt").write_text("".join(json.dumps({"text": f"{line}\n{line}"}) + "\n" for line in found[:10]))
    assert haystack.sentences(str(tmp_path / "rows.txt")) == tuple(line for line in found[:10] for _ in range(2))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes is not UTF-8 text"):
        haystack.sentences(str(tmp_path / "bytes"))
    assert len(set(haystack.sentences(None))) > 4000


def test_through_the_command_line(tiny_model, tmp_path, monkeypatch, capsys):
    from lm_eval.models.huggingface import HFLM

    generate = HFLM._model_generate
    monkeypatch.setattr(
        HFLM,
        "_model_generate",
        lambda self, context, max_length, **o: generate(self, context, context.shape[1] + 1, **o),
    )
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"Sentence {n} ends here." for n in range(30)))
    options = ["--suite", "needle", "--limit", 1, "--max-length", 1024, "--device", "cpu", "--haystack", book]
    options += ["--out", tmp_path / "out"]
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["task"] for row in results["by_length"]} == set(NEEDLES) and len(results["metrics"]) == 3 * len(NEEDLES)
    assert results["data"]["haystack"] == str(book) and len(results["data"]["haystack_sha256"]) == 64
    sample = json.loads((tmp_path / "out" / "samples_lrnn_needle_single_2.jsonl").read_text())
    assert "ends here. Sentence" in sample["doc"]["context"]
    assert "## Accuracy by length" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "by_length.csv").is_file()
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert cli.main(["eval", str(tiny_model), "--suite", "quick", "--haystack", str(book)]) == 2
    assert "--haystack is the text of needles, which the suite 'quick' does not have" in capsys.readouterr().err
    assert cli.main(["eval", str(tiny_model), "--suite", "needle", "--max-length", "1000"]) == 2
    assert "needles need a context of at least 1024 tokens, not 1000" in capsys.readouterr().err


def test_what_the_task_needs_from_the_model(tiny_model, tmp_path):
    with pytest.raises(UserError, match="prompts of a given number of tokens need a tokenizer: pretrained=DIR"):
        tokenizer_of({})
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        tokenizer_of({"tokenizer": str(tmp_path / "nothing")})
    assert context_length({"pretrained": str(tiny_model)}) == 2048
    assert context_length({"pretrained": str(tiny_model), "max_length": 512}) == 512


def test_task_files_describe_the_documents():
    assert {path.stem for path in FOLDER.glob("lrnn_*.yaml")} == set(NEEDLES) <= set(retrieval_report.UNITS)
    assert load_yaml(FOLDER / "needle.yaml")["task"] == list(NEEDLES)
    config = load_yaml(FOLDER / f"{NEEDLES[0]}.yaml")
    assert [m["metric"] for m in config["metric_list"]][3:] == [f"contains_{length}" for length in needles.LENGTHS]
    assert config["generation_kwargs"]["max_gen_toks"] == needles.GENERATED_TOKENS
