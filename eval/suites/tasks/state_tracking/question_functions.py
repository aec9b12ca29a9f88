"""Functions that the state-tracking task files name with `!function`: documents, prompts, scores."""

from typing import Any

import datasets

from lrnn.eval.state_tracking import documents as state_tracking_documents
from lrnn.eval.state_tracking.documents import Document
from lrnn.track.metrics import scaled_accuracy


def documents(name: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the data set of a text task. lm-eval passes a task's `dataset_kwargs` and `metadata` as keywords."""
    rows = [dict(document) for document in state_tracking_documents.documents(name)]
    return {"test": datasets.Dataset.from_list(rows)}


# These are callables, not templates: lm-eval turns a rendered template such as "3" into a number.
def context(doc: Document) -> str:
    return doc["context"]


def choices(doc: Document) -> list[str]:
    return doc["choices"]


def answer_number(doc: Document) -> int:
    return doc["answer"]


def answer_text(doc: Document) -> str:
    return doc["choices"][doc["answer"]]


def choice_scores(doc: Document, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Score whether the right choice has the greatest log-likelihood (nats, `results[i]` for choice i).

    The first of equals counts as chosen. Log-likelihoods are not divided by length: with most tokenizers all choices
    of a task are equally long.
    """
    best = max(range(len(results)), key=lambda choice: results[choice][0])
    return _scores("acc", doc, best == doc["answer"])


def generation_scores(doc: Document, results: list[str]) -> dict[str, float]:
    """Score whether the first generated line is the right choice, ignoring surrounding white space."""
    return _scores("exact_match", doc, results[0].split("\n")[0].strip() == answer_text(doc))


def _scores(metric: str, doc: Document, right: bool) -> dict[str, float]:
    """Return the score of one document, the score scaled so that guessing gives 0, and the score under its length.

    Metrics of other lengths are left out, so that lm-eval takes their means and errors over their own documents.
    """
    score = float(right)
    scaled = scaled_accuracy(score, len(doc["choices"]))
    return {metric: score, f"scaled_{metric}": scaled, f"{metric}_len{doc['length']}": score}
