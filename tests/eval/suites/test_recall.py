"""Test the suite `recall`: JRT's windows and prompts, lists of keys and values, scores of oracles, the command line."""

import json
from functools import cache

import pytest
from fake_lms import First, Gold
from hub_stand_ins import JRT, write_hub_copies
from lm_eval.tasks._yaml_loader import load_yaml
from torch.utils import collect_env

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.offline import go_offline
from lrnn.eval.retrieval import pairs, windows
from lrnn.eval.retrieval import report as retrieval_report
from lrnn.eval.suites import harness, hub_data, report, sections
from lrnn.eval.suites.suites import RECALL, TASK_FOLDER

FOLDER = TASK_FOLDER / "recall"
# By hand from the source of JRT's tasks, github.com/HazyResearch/prefix-linear-attention.
PROMPTS = {
    "swde": "Name: Widget Two. Maker: Acme Corporation. Weight: 12 kg. Maker:",
    "fda": "Name: Widget Two. Maker: Acme Corporation. Weight: 12 kg. . Weight:",
    "squad": "Ann has a cat. It is called Tom.\nThe cat of Ann is called",
    "triviaqa": "Oslo is a city. Which city?",
    "nq": "Mars is red. Which is red?",
    "drop": "They won 21 to 14. How many points?",
}


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": text.split()}

    def decode(self, ids, skip_special_tokens):
        return " ".join(ids)


@pytest.mark.parametrize(
    ("text", "answers", "position", "window"),
    [
        ("a b c d e f g H i j k l", ["h"], None, "e f g H i j"),  # half before, half after, whatever the case
        ("a b c d e f g h i j k l", ["b"], None, "a b c d e f"),  # what is missing before is added after
        ("a b c d e f g h i j k l", ["l"], None, "i j k l"),  # but not the other way round
        ("a b c d e", ["e"], None, "b c d e"),  # also where all would fit
        ("a b x d e f g h i j x l", ["x"], None, "a b x d e f"),  # the first occurrence
        ("a b c d e f g h i j k l", ["q", "h"], None, "e f g h i j"),  # of the first answer that occurs
        ("a b c d e f g h i j k l", ["q"], None, "i j k l"),  # none: the end
        ("a b c d e f g h i j k l", ["q"], 4, "b c d e f g"),  # or what the data set says
        ("a b c d e", ["q"], 1, "b c d e"),  # but not in a short text
    ],
)
def test_windows_around_the_answer(text, answers, position, window, monkeypatch):
    monkeypatch.setattr(windows, "CONTEXT", 6 + windows.GENERATED_TOKENS)
    assert windows.window_of(text, answers, Words(), position) == window


def test_pairs_by_hand():
    doc = pairs.document(4, 1)
    lines = doc["context"].split("\n")
    key = lines[-1].removesuffix(":")
    listed = dict(line.split(": ") for line in lines[:4])
    assert lines[4] == "" and len(lines) == 9 and list(listed.values()) == doc["values"]
    assert [listed[key]] == doc["answers"] and list(listed).index(key) == 17 % 4 == 1 and doc["third"] == 0
    assert sorted(lines[5:8]) == sorted(line for line in lines[:4] if not line.startswith(f"{key}:"))
    docs = pairs.documents(lambda text: len(text.split()), 512)
    assert [doc["length"] for doc in docs[:6]] == [4, 8, 16, 32, 64, 128], "256 pairs have more than 768 words"
    assert len(docs) == 6 * 120 and docs[6]["context"] == pairs.document(4, 1)["context"]
    for size in pairs.PAIRS:
        made = [pairs.document(size, number) for number in range(24)]
        assert {doc["third"] for doc in made} == {0, 1, 2} and len({doc["context"] for doc in made}) == 24
        assert all(len(set(doc["values"])) == size == len(doc["values"]) for doc in made)
    with pytest.raises(UserError, match="a list of 4 keys and values does not fit into 20 tokens"):
        pairs.documents(lambda text: len(text.split()), 20)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", cache(lambda: ""))  # it starts pip
        patch.setattr(pairs, "DOCUMENTS_PER_SIZE", 6)
        patch.setenv(hub_data.FOLDER, str(write_hub_copies(tmp_path_factory.mktemp("hub"))))
        yield


def load(model):
    go_offline()
    harness.silence_expected_warnings()
    return harness.load_tasks(list(RECALL), metadata={"pretrained": str(model), "max_length": 2048})


def test_prompts_are_jrts(tiny_model, copies):
    tasks = load(tiny_model).tasks
    for name, prompt in PROMPTS.items():
        task = tasks[f"lrnn_recall_{name}"]
        task.build_all_requests()
        ((context, settings),) = [instance.args for instance in task.instances]
        assert context == prompt, name
        assert settings == {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}
    assert len(JRT["based-swde-v2"]) == 2, "an answer of one character is not asked for"


def test_oracles(tiny_model, copies):
    loaded = load(tiny_model)
    raw = harness.run_tasks(Gold(loaded.tasks), loaded)
    rows = report.metric_rows(raw)
    assert {(row["metric"], row["value"]) for row in rows} == {
        (m, 1.0) for m in ("contains", "answered", "given_answered")
    }
    (average,) = sections.score_rows(rows)
    assert average["task"] == "recall_avg6" and average["value"] == 1.0 and average["metric"] == "contains"
    by_length = retrieval_report.length_rows(raw)
    assert [(row["unit"], row["length"], row["n"]) for row in by_length] == [
        ("pairs", n, 6) for n in (4, 8, 16, 32, 64)
    ]
    assert {row["accuracy"] for row in by_length} == {1.0}
    assert raw["results"]["lrnn_recall_pairs"]["contains_64,none"] == 1.0

    loaded = load(tiny_model)
    rows = report.metric_rows(harness.run_tasks(First(loaded.tasks), loaded))
    answered = {row["task"].removeprefix("lrnn_recall_"): row["value"] for row in rows if row["metric"] == "answered"}
    # "the" is none of a list's values, and it is in the sentence that SQuAD's prompt ends with.
    assert answered == {"pairs": 0, "swde": 1, "fda": 1, "squad": 0, "triviaqa": 1, "nq": 1, "drop": 1}
    assert {row["value"] for row in rows if row["metric"] != "answered"} == {0}


def test_scores_by_hand():
    functions = load_yaml(FOLDER / "lrnn_recall_swde.yaml")
    score = functions["process_results"]
    doc = {"answers": ["12 kg", "twelve"], "question": "The weight is:"}
    assert score(doc, [" it is 12 KG."]) == {"contains": 1, "answered": 1, "given_answered": (1, 1)}
    assert score(doc, [" Twelve"])["contains"] == 1
    assert score(doc, [" 12"]) == {"contains": 0, "answered": 1, "given_answered": (0, 1)}
    for empty in ("", "  ", " weight "):
        assert score(doc, [empty]) == {"contains": 0, "answered": 0, "given_answered": (0, 0)}
    score = load_yaml(FOLDER / "lrnn_recall_pairs.yaml")["process_results"]
    doc = {"answers": ["1234"], "values": ["1234", "5678"], "length": 4}
    assert score(doc, [" 1234"]) == {"contains": 1, "answered": 1, "given_answered": (1, 1), "contains_4": 1}
    assert score(doc, [" 5678"]) == {"contains": 0, "answered": 1, "given_answered": (0, 1), "contains_4": 0}
    assert score(doc, [" 123"])["answered"] == 0


def test_through_the_command_line(tiny_model, copies, tmp_path, capsys, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    generate = HFLM._model_generate
    monkeypatch.setattr(
        HFLM,
        "_model_generate",
        lambda self, context, max_length, **o: generate(self, context, context.shape[1] + 1, **o),
    )
    options = ["--suite", "recall", "--limit", 1, "--device", "cpu", "--out", tmp_path / "out"]
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["task"] for row in results["metrics"]} == {"recall_avg6", *RECALL} and results["left_out"] == []
    assert cli.main(["eval", str(tiny_model), *map(str, options), "--max-length", "2047"]) == 2
    assert (
        "lrnn_recall_swde shows windows of 2048 tokens, which exceed the context of 2047: give --max-length 2048"
        in capsys.readouterr().err
    )
    monkeypatch.delenv(hub_data.FOLDER)
    monkeypatch.setattr(hub_data, "_is_there", lambda name: False)
    monkeypatch.setattr(harness, "load_model", lambda *args: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert cli.main(["eval", str(tiny_model), *map(str, options)]) == 2
    line = capsys.readouterr().err
    assert "hazyresearch/based-swde-v2 (lrnn_recall_swde)" in line and "hazyresearch/based_drop" in line
    assert "`lrnn eval --fetch --suite recall`" in line


def test_task_files():
    assert {path.stem for path in FOLDER.glob("lrnn_*.yaml")} == set(RECALL)
    assert load_yaml(FOLDER / "recall.yaml")["task"] == list(RECALL)
    metrics = [entry["metric"] for entry in load_yaml(FOLDER / "lrnn_recall_pairs.yaml")["metric_list"]]
    assert metrics[3:] == [f"contains_{size}" for size in pairs.PAIRS]
    for name, wanted in (("pairs", pairs.GENERATED_TOKENS), ("nq", windows.GENERATED_TOKENS)):
        assert load_yaml(FOLDER / f"lrnn_recall_{name}.yaml")["generation_kwargs"]["max_gen_toks"] == wanted
