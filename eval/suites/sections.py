"""What some tasks add to the results of a run: scores over several tasks, and rows by length.

A kind of tasks is an object with the functions of `ByLength`, such as a `LengthReport`; a new one is added to
`BY_LENGTH`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lrnn.eval.commonsense import averages
from lrnn.eval.retrieval import report as retrieval_report
from lrnn.eval.state_tracking.report import REPORT as STATE_TRACKING
from lrnn.eval.traces.report import REPORT as TRACES

Raw = dict[str, Any]


class ByLength(Protocol):
    """Report how tasks depend on the length of their documents. A row is a dict; `row["task"]` names its task."""

    @property
    def NAME(self) -> str:
        """The name of this kind of tasks, for file names."""

    def is_by_length(self, metric: str) -> bool:
        """Return whether a metric of lm-eval belongs to a single length, so that `length_rows` reports it."""

    def length_rows(self, raw: Raw) -> list[Raw]:
        """Return the rows of these tasks, from the result of lm-eval's `simple_evaluate`."""

    def owns(self, row: Raw) -> bool:
        """Return whether `length_rows` made a row."""

    def markdown_table(self, rows: list[Raw]) -> str:
        """Return the rows as Markdown."""

    def write(self, folder: Path, rows: list[Raw], stem: str) -> None:
        """Write the rows to `folder/stem.csv`, and a plot of them to `folder/stem.png`."""


BY_LENGTH: tuple[ByLength, ...] = (STATE_TRACKING, TRACES, retrieval_report)
SCORES: tuple[Callable[[list[Raw]], list[Raw]], ...] = (
    STATE_TRACKING.score_rows,
    TRACES.score_rows,
    averages.score_rows,
    retrieval_report.score_rows,
)


def is_by_length(metric: str) -> bool:
    return any(kind.is_by_length(metric) for kind in BY_LENGTH)


def score_rows(rows: list[Raw]) -> list[Raw]:
    """Return the scores over several tasks, for the metric rows of a run."""
    return [score for scores in SCORES for score in scores(rows)]


def length_rows(raw: Raw) -> list[Raw]:
    return [row for kind in BY_LENGTH for row in kind.length_rows(raw)]


def markdown_tables(rows: list[Raw]) -> str:
    return "\n".join(kind.markdown_table(own) for kind, own in _kinds(rows))


def write(folder: Path, rows: list[Raw]) -> None:
    """Write `by_length.csv` and `.png`; the name of the kind is appended if there are several."""
    kinds = _kinds(rows)
    for kind, own in kinds:
        kind.write(folder, own, "by_length" if len(kinds) == 1 else f"by_length_{kind.NAME}")


def _kinds(rows: list[Raw]) -> list[tuple[ByLength, list[Raw]]]:
    found = [(kind, [row for row in rows if kind.owns(row)]) for kind in BY_LENGTH]
    return [(kind, own) for kind, own in found if own]
