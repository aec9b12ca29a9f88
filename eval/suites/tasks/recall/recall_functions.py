"""Functions that the recall task files name with `!function`: documents, prompts, scores."""

from typing import Any

import datasets

from lrnn.errors import UserError
from lrnn.eval.retrieval import pairs, windows
from lrnn.eval.retrieval.scores import ratio, scores_of
from lrnn.eval.retrieval.tokens import context_length, counter, tokenizer_of
from lrnn.eval.suites import hub_data

__all__ = ["answers", "context", "pairs_documents", "pairs_scores", "ratio", "window_scores", "windows_documents"]

Doc = dict[str, Any]


def windows_documents(hub: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """Return the data set made from one of the hub. lm-eval passes `dataset_kwargs` and the model's arguments."""
    longest = context_length(metadata)
    if longest < windows.CONTEXT:  # lm-eval would cut off the half of a window before the answer, or the answer too
        raise UserError(
            f"lrnn_recall_{hub} shows windows of {windows.CONTEXT} tokens, which exceed the context of {longest}: give "
            f"--max-length {windows.CONTEXT}"
        )
    rows = windows.documents(hub, hub_data.load(hub), tokenizer_of(metadata))
    return {"test": datasets.Dataset.from_list([dict(row) for row in rows])}


def pairs_documents(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Return the data set of generated lists, of the sizes that fit into the context."""
    rows = pairs.documents(counter(metadata), context_length(metadata))
    return {"test": datasets.Dataset.from_list([dict(row) for row in rows])}


# These are callables, not templates: lm-eval turns a rendered template such as "3" into a number.
def context(doc: Doc) -> str:
    return doc["context"]


def answers(doc: Doc) -> list[str]:
    return doc["answers"]


def window_scores(doc: Doc, results: list[str]) -> dict[str, Any]:
    """Score JRT's `contains`. A text that is empty, or repeats the question, is no answer unless it is right."""
    right, text = windows.contains(results[0], doc["answers"]), results[0].strip().lower()
    return scores_of(right, right or (text != "" and text not in doc["question"].lower()))


def pairs_scores(doc: Doc, results: list[str]) -> dict[str, Any]:
    """Score whether the text contains the asked key's value, and whether it contains any value of the list."""
    right = doc["answers"][0] in results[0]
    answered = any(value in results[0] for value in doc["values"])
    return scores_of(right, answered, f"contains_{doc['length']}")
