"""Functions that the state-tracking task files name with `!function`: documents, prompts, scores."""

from typing import Any

import datasets

from lrnn.eval.state_tracking import text_documents
from lrnn.eval.state_tracking.text_documents import Document
from lrnn.track.metrics import scaled_accuracy


def documents(name: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Data set of a text task; lm-eval passes a task's `dataset_kwargs` and `metadata` as keywords."""
    return {"test": datasets.Dataset.from_list([dict(document) for document in text_documents.documents(name)])}


# Callables, not templates: lm-eval turns a rendered template such as "3" into a number.
def context(doc: Document) -> str:
    return doc["context"]


def choices(doc: Document) -> list[str]:
    return doc["choices"]


def answer_number(doc: Document) -> int:
    return doc["answer"]


def answer_text(doc: Document) -> str:
    return doc["choices"][doc["answer"]]


def choice_scores(doc: Document, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the right choice has the greatest log-likelihood (nats, `results[i]` for choice i), the first of equals.

    The choices are not scaled by their length: most tokenizers make all of a task's equally long.
    """
    best = max(range(len(results)), key=lambda choice: results[choice][0])
    return _scores("acc", doc, best == doc["answer"])


def generation_scores(doc: Document, results: list[str]) -> dict[str, float]:
    """Whether the first generated line is the right choice, blanks around it aside."""
    return _scores("exact_match", doc, results[0].split("\n")[0].strip() == answer_text(doc))


def _scores(metric: str, doc: Document, right: bool) -> dict[str, float]:
    """The score of one document, scaled so that guessing is 0, and under its length.

    A metric of another length is left out: lm-eval then takes the mean, and its error, over that length's documents.
    """
    score = float(right)
    scaled = scaled_accuracy(score, len(doc["choices"]))
    return {metric: score, f"scaled_{metric}": scaled, f"{metric}_len{doc['length']}": score}
