"""The scores of one document: right, answered, and both as a pair for the accuracy given an answer."""

from collections.abc import Sequence


def scores_of(right: bool, answered: bool, by_length: str | None = None) -> dict[str, float | tuple[float, float]]:
    """Return the metrics of a document, with that of its length if it has one. A right document is answered."""
    found: dict[str, float | tuple[float, float]] = {
        "contains": float(right),
        "answered": float(answered),
        "given_answered": (float(right), float(answered)),
    }
    return found if by_length is None else found | {by_length: float(right)}


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the accuracy of the answered documents, from (right, answered) of all. It is 0 if none was answered."""
    right, answered = (sum(values) for values in zip(*pairs, strict=True))
    return right / answered if answered else 0.0
