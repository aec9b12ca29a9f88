"""Test the whole scoring path: a model that knows every answer scores 1.0, and one that knows none scores 0.

LRNN_TORTURE=1 runs all solutions of HumanEval instead of every fourth (`make torture`).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lrnn.eval.suites import fetch_data, harness, sandbox
from lrnn.eval.suites.suites import HELDOUT_TASK, SUITES, TASK_FOLDER

pytestmark = pytest.mark.usefixtures("few_documents")
TORTURE = os.environ.get("LRNN_TORTURE") == "1"


class Oracle(LM):
    """A model that gives the gold answer, phrased as in each benchmark's own examples."""

    def generate_until(self, requests):
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests):
        return [(0.0, True) for _ in requests]

    def loglikelihood_rolling(self, requests):
        return [0.0 for _ in requests]

    @staticmethod
    def answer(doc):
        if "canonical_solution" in doc:
            return doc["canonical_solution"]
        if "code" in doc:
            return doc["code"]
        if "solution" in doc:
            return " " + doc["solution"]
        reasoning, result = doc["answer"].split("####")
        return f" {reasoning} The answer is {result.strip()}."


class FinalAnswerOracle(Oracle):
    """A model that phrases a MATH answer as in the examples, which `exact_match` looks for."""

    @staticmethod
    def answer(doc):
        return f" Final Answer: The final answer is ${doc['answer']}$. I hope it is correct."


class Ignorant(Oracle):
    @staticmethod
    def answer(doc):
        return " The answer is -12345.\n"


def score(model, task, limit):
    raw = harness.run_tasks(model, harness.load_tasks([task]), limit)
    return {key: value for key, value in raw["results"][task].items() if "," in key and "stderr" not in key}


GENERATION = [
    ("lrnn_humaneval", Oracle, 12, {"pass@1,create_test": 1.0}),
    ("lrnn_mbpp", Oracle, 24, {"pass_at_1,none": 1.0}),
    ("lrnn_gsm8k_cot", Oracle, 70, {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}),
    ("lrnn_minerva_math", FinalAnswerOracle, 70, {"exact_match,none": 1.0}),
    ("lrnn_minerva_math", Oracle, 35, {"math_verify,none": 1.0}),
]


@pytest.mark.parametrize(("task", "oracle", "limit", "expected"), GENERATION)
def test_the_right_answer_scores_one(task, oracle, limit, expected):
    scores = score(oracle(), task, limit)
    assert {key: scores[key] for key in expected} == expected


@pytest.mark.parametrize("task", sorted({case[0] for case in GENERATION}))
def test_a_wrong_answer_scores_zero(task):
    assert set(score(Ignorant(), task, 6).values()) == {0.0}


@pytest.mark.parametrize("task", sorted(set(SUITES["quick"].tasks) | set(SUITES["fast"].tasks)))
def test_certainty_is_zero_bits(task):
    assert score(Oracle(), task, None) == {"bits_per_byte,none": 0.0}


def test_certainty_is_zero_bits_of_heldout_text(heldout_file, monkeypatch):
    monkeypatch.setenv("LRNN_EVAL_HELDOUT", str(heldout_file))
    assert score(Oracle(), HELDOUT_TASK, None) == {"bits_per_byte,none": 0.0}


def test_humaneval_solutions_pass_in_the_sandbox():
    def passes(doc):
        program = f"{doc['prompt']}{doc['canonical_solution']}\n{doc['test']}\ncheck({doc['entry_point']})"
        return sandbox.run(program, timeout_s=60).passed

    docs = fetch_data.load_rows("humaneval")[:: 1 if TORTURE else 4]
    with ThreadPoolExecutor(2) as pool:
        failed = [doc["task_id"] for doc, passed in zip(docs, pool.map(passes, docs), strict=True) if not passed]
    assert len(docs) == (164 if TORTURE else 41) and failed == []


def test_the_mbpp_problem_that_needs_setup_code_can_be_solved():
    rows = fetch_data.load_rows("mbpp")
    with_setup = [number for number, doc in enumerate(rows) if doc["test_setup_code"]]
    raw = simple_evaluate(
        model=Oracle(),
        tasks=["lrnn_mbpp"],
        task_manager=TaskManager(include_path=str(TASK_FOLDER), include_defaults=False),
        samples={"lrnn_mbpp": with_setup},
        confirm_run_unsafe_code=True,
    )
    assert len(with_setup) == 1 and raw["results"]["lrnn_mbpp"]["pass_at_1,none"] == 1.0
