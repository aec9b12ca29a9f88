"""Functions that the needle task files name with `!function`: documents, prompts, scores."""

import re
from typing import Any

import datasets

from lrnn.eval.retrieval import needles
from lrnn.eval.retrieval.scores import ratio, scores_of
from lrnn.eval.retrieval.tokens import context_length, counter

__all__ = ["answer", "context", "documents", "ratio", "scores"]  # names in the task files

ANSWERS = {"number": r"\d{7}", "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def documents(form: str, haystack: str | None = None, **metadata: Any) -> dict[str, datasets.Dataset]:
    """Return the data set of a form. lm-eval passes `dataset_kwargs` and `metadata`, with the model's arguments."""
    count, longest = counter(metadata), context_length(metadata)
    rows = [dict(document) for document in needles.documents(form, count, longest, haystack)]
    return {"test": datasets.Dataset.from_list(rows)}


# These are callables, not templates: lm-eval turns a rendered template such as "3" into a number.
def context(doc: needles.Document) -> str:
    return doc["context"]


def answer(doc: needles.Document) -> str:
    return doc["answer"]


def scores(doc: needles.Document, results: list[str]) -> dict[str, Any]:
    """Score whether the text generated contains the value, and whether it contains anything of the value's form."""
    generated = results[0].lower()
    right, answered = doc["answer"] in generated, re.search(ANSWERS[doc["kind"]], generated) is not None
    return scores_of(right, answered, f"contains_{doc['length']}")
