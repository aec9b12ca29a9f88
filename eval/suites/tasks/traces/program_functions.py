"""Functions that the task files name with `!function`: documents, prompts, scores."""

from typing import Any

import datasets

from lrnn.eval.suites.tasks.state_tracking import question_functions
from lrnn.eval.suites.tasks.state_tracking.question_functions import answer_number, answer_text, choices, context
from lrnn.eval.traces import documents as trace_documents
from lrnn.eval.traces.documents import Document

__all__ = ["answer_number", "answer_text", "choice_scores", "choices", "context", "documents", "generation_scores"]


def documents(name: str, seed: int, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the data set of a task. lm-eval passes a task's `dataset_kwargs` and `metadata` as keywords."""
    rows = [dict(document) for document in trace_documents.documents(name, seed)]
    return {"test": datasets.Dataset.from_list(rows)}


def choice_scores(doc: Document, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score the choice with the greatest log-likelihood (nats, `results[i]` for choice i)."""
    scores = question_functions.choice_scores(doc, results)
    return {"area": scores.pop("scaled_acc")} | scores


def generation_scores(doc: Document, results: list[str]) -> dict[str, float]:
    """Score the first generated line."""
    scores = question_functions.generation_scores(doc, results)
    return {"area": scores.pop("scaled_exact_match")} | scores
