"""Test the text tasks: answers recovered from the text alone, balance, disjointness, determinism."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from text_solvers import SOLVERS, solve

from lrnn.errors import UserError
from lrnn.eval.state_tracking import documents as text_documents
from lrnn.eval.state_tracking.documents import DOCUMENTS_PER_LENGTH, LENGTHS, documents, shots
from lrnn.eval.state_tracking.report import REPORT as text_report
from lrnn.eval.state_tracking.tasks import TEXT_TASKS
from lrnn.track.tasks.counter_rng import split_seed

DIGEST = "50825e09f6296b883417bbd4589cd584d43757fe30aeb4b15ac7681a8d7c2bf9"


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_every_answer_follows_from_the_text(name):
    for document in documents(name):
        answer = document["choices"][document["answer"]]
        assert solve(name, document["context"]) == (answer, document["length"])


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_the_examples_are_solved_and_every_answer_is_equally_often_right_in_them(name):
    *examples, _ = documents(name)[0]["context"].split("\n\n")
    answers = []
    for example in examples:
        question, answer = example.rsplit(" ", 1)
        assert SOLVERS[name](question)[0] == answer
        answers.append(answer)
    assert len(set(examples)) == len(examples)
    assert set(Counter(answers)) == set(TEXT_TASKS[name].choices) and len(set(Counter(answers).values())) == 1
    assert answers[: len(answers) // 2] != answers[len(answers) // 2 :], "the second half repeats the first"


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_all_documents_have_the_same_examples_and_no_example_is_a_document(name):
    prompts = [document["context"].rsplit("\n\n", 1) for document in documents(name)]
    (examples,) = {prompt[0] for prompt in prompts}
    shown = {example.rsplit(" ", 1)[0] for example in examples.split("\n\n")}
    assert shown == {question for question, _ in shots(TEXT_TASKS[name])}
    assert not shown & {prompt[1] for prompt in prompts}


def test_examples_are_of_the_training_split_and_documents_of_the_test_split(monkeypatch):
    task = TEXT_TASKS["program"]
    drawn = []

    def spy(seed, indices, length):
        drawn.append((seed, length))
        return type(task).draw(task, seed, indices, length)

    monkeypatch.setattr(task, "draw", spy)
    text_documents.documents.__wrapped__("program")
    assert {seed for seed, length in drawn if length in LENGTHS} == {split_seed(0, "test")}
    assert {seed for seed, length in drawn if length not in LENGTHS} == {split_seed(0, "train")}


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_answers_are_balanced_at_every_length_and_in_every_beginning(name):
    docs, k = documents(name), len(TEXT_TASKS[name].choices)
    assert len(docs) == DOCUMENTS_PER_LENGTH * len(LENGTHS)
    for number, length in enumerate(LENGTHS):
        answers = [document["answer"] for document in docs[number :: len(LENGTHS)]]
        assert [document["length"] for document in docs[number :: len(LENGTHS)]] == [length] * len(answers)
        assert Counter(answers) == dict.fromkeys(range(k), DOCUMENTS_PER_LENGTH // k)
        for limit in (2, 7, 31):
            assert max(Counter(answers[:limit]).values()) == -(-limit // k)
    assert {document["answer"] for document in docs[: len(LENGTHS)]} == set(range(k))


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_long_documents_do_not_repeat(name):
    for length in LENGTHS[3:]:
        contexts = [document["context"] for document in documents(name) if document["length"] == length]
        assert len(set(contexts)) == len(contexts)


def test_documents_match_the_versions_of_the_task_files():
    made = [text_documents.documents.__wrapped__(name) for name in TEXT_TASKS]
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert digest == DIGEST, "other documents need new versions in the task files"


def test_a_sample_does_not_depend_on_its_batch():
    for task in TEXT_TASKS.values():
        ids, answers = task.draw(4, torch.arange(40), 16)
        again, answer = task.draw(4, torch.tensor([23]), 16)
        assert torch.equal(ids[23:24], again) and torch.equal(answers[23:24], answer)


def test_no_symbol_alone_gives_away_the_answer():
    """Every kind of move and every ball occurs, and drawn balls and lines are uniform."""
    ids, _ = TEXT_TASKS["s5"].draw(4, torch.arange(2000), 8)
    balls = Counter(ids[:, -1].tolist())
    assert balls.keys() == set(range(5)) and min(balls.values()) > 330
    ids, answers = TEXT_TASKS["program"].draw(4, torch.arange(2000), 8)
    assert set(ids.flatten().tolist()) == {5 * factor + term for factor in range(1, 5) for term in range(5)}
    assert min(Counter(answers.tolist()).values()) > 330


def test_unknown_names_are_one_clear_error():
    with pytest.raises(UserError, match=r"unknown text task 'pairty'; did you mean parity\? valid: parity, even_pairs"):
        documents("pairty")


def sample(name, length, answer, score, metric):
    document = {"length": length, "answer": answer, "choices": list(TEXT_TASKS[name].choices)}
    return {"doc": document, metric: score}


def test_rows_by_length_count_the_floor_of_the_documents_that_were_run():
    choosing = [sample("s5", 8, answer, score, "acc") for answer, score in [(0, 1), (0, 1), (1, 0), (2, 1)]]
    generating = [sample("parity", 4, 1, 0.0, "exact_match")]
    rows = text_report.length_rows({"samples": {"lrnn_s5_mc": choosing, "lrnn_parity_gen": generating}})
    first, second = rows
    assert (first["task"], first["kind"], first["unit"], first["length"], first["n"]) == ("s5", "mc", "moves", 8, 4)
    assert first["accuracy"] == 0.75 and first["floor"] == 0.5
    assert first["stderr"] == pytest.approx((0.1875 / 3) ** 0.5)  # variance 3/16 over n - 1
    assert first["scaled_accuracy"] == pytest.approx(0.55 / 0.8) and first["scaled_stderr"] == first["stderr"] / 0.8
    assert (second["accuracy"], second["floor"], second["stderr"], second["scaled_stderr"]) == (0, 1, None, None)
    assert second["scaled_accuracy"] == -1
    table = text_report.markdown_table(rows)
    assert "| s5 | moves | 0.500 |  | 0.750 +- 0.250 [0.688] |" in table and "choosing among all answers" in table
    assert "| parity | bits | 1.000 | 0.000 [-1.000] |  |" in table


def test_the_score_is_the_mean_of_all_tasks_of_a_kind():
    names = text_report.task_names["mc"]
    rows = [
        {"task": name, "metric": metric, "filter": "none", "value": value, "stderr": 0.3, "n": 5, "shots": 4 + i % 3}
        for i, name in enumerate(names)
        for metric, value in (("acc", 0.9), ("scaled_acc", i / 10))
    ]
    (score,) = text_report.score_rows(rows)
    assert score["task"] == "state_tracking_mc" and score["metric"] == "scaled_acc" and score["n"] == 50
    assert score["value"] == pytest.approx(0.45) and score["stderr"] == pytest.approx(0.3 / 10**0.5)
    assert score["shots"] == "4 to 6" and score["tasks"] == list(names)
    assert text_report.score_rows(rows[:-1]) == [], "one task is missing"
    rows[1]["stderr"] = None
    assert text_report.score_rows(rows)[0]["stderr"] is None
