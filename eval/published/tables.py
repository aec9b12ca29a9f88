"""Read the tables of published results."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrnn.parsing import parse_yaml

TABLES = Path(__file__).parent / "tables.yaml"


@dataclass(frozen=True)
class PublishedRow:
    """What a table says of one model.

    Attributes:
        model: its name, with the range of its eigenvalues where the paper has both.
        paper: arXiv number.
        title: the paper's, or a short form of it.
        table: number or name of the table.
        checked: whether the figures were compared with the paper itself.
        protocol: how the table's models were trained and scored, by key, as far as it is known.
        note: what else must be said, or an empty text.
        values: by lm-eval's (task, metric), in lm-eval's units: a share for an accuracy, and a perplexity as it is.
    """

    model: str
    paper: str
    title: str
    table: str
    checked: bool
    protocol: dict[str, str]
    note: str
    values: dict[tuple[str, str], float]

    @property
    def source(self) -> str:
        """Return where the row is printed, and whether it was checked there."""
        return f"arXiv {self.paper}, table {self.table}" + ("" if self.checked else ", not checked")


@functools.cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return the rows of all tables, in the order of the file."""
    tables = parse_yaml(TABLES.read_text(encoding="utf-8"), str(TABLES)).value
    return tuple(row for table in tables for row in _rows(table))


def _rows(table: dict[str, Any]) -> list[PublishedRow]:
    columns = [tuple(column.split(" ", 1)) for column in table["columns"]]
    fields = {key: table[key] for key in ("paper", "title", "table", "checked")}
    protocol = {key: str(value) for key, value in table["protocol"].items()}
    found = []
    for model, printed in table["rows"].items():
        pairs = zip(columns, printed, strict=True)
        values = {column: _in_units(column[1], value) for column, value in pairs if value is not None}
        found.append(PublishedRow(model, **fields, protocol=protocol, note=table.get("note", ""), values=values))
    return found


def _in_units(metric: str, printed: float) -> float:
    return printed if metric.endswith("perplexity") else printed / 100
