"""Choose published results to set beside a run's, and say in what the protocols differ."""

from collections.abc import Iterable
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.published.tables import PublishedRow, published_rows
from lrnn.eval.suites import protocol

Column = tuple[str, str]  # lm-eval's task and metric


def choose(words: list[str], columns: Iterable[Column]) -> list[PublishedRow]:
    """Return the published rows that have a value in one of `columns`.

    Args:
        words: texts, one of which the model's name, the paper's number or its title must contain, in any case; empty
            for all rows.
        columns: lm-eval's (task, metric) of the run's results.

    Raises:
        UserError: no row contains one of the words, or none has a column.
    """
    wanted = {published_column(column) for column in columns}
    rows = list(published_rows())
    for word in words:
        if not any(_contains(row, word) for row in rows):
            papers = ", ".join(dict.fromkeys(f"{row.paper} ({row.title})" for row in rows))
            raise UserError(f"--published {word}: no published model or paper has this in its name; there are {papers}")
    rows = [row for row in rows if not words or any(_contains(row, word) for word in words)]
    found = [row for row in rows if wanted & row.values.keys()]
    if not found:
        known = ", ".join(sorted({task for row in rows for task, _ in row.values}))
        raise UserError(f"no published result is of a task and metric of these results; there are results of {known}")
    return found


def published_column(column: Column) -> Column:
    """Return the name of a column in the published tables: lm-eval's, whose prompts the tasks called lrnn_ have."""
    return column[0].removeprefix("lrnn_"), column[1]


def _contains(row: PublishedRow, word: str) -> bool:
    return any(word.lower() in text.lower() for text in (row.model, row.paper, row.title))


def describe_protocol(row: PublishedRow) -> str:
    """Return how the row's model was trained and scored, as far as it is known."""
    told = [f"{key} {value}" for key, value in row.protocol.items()]
    missing = [key for key in ("tokens", "tokenizer", "window", "bos") if key not in row.protocol]
    return ", ".join(told) + (f"; unknown: {', '.join(missing)}" if missing else "")


def published_table(words: list[str], results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of published rows for the metrics of `results`, with the protocol of each table below.

    Args:
        words: as for `choose`.
        results: contents of results.json.

    Raises:
        UserError: as for `choose`.
    """
    columns: dict[Column, None] = {}
    for result in results:
        columns |= dict.fromkeys((row["task"], row["metric"]) for row in result["metrics"])
    rows = choose(words, columns)
    kept = [c for c in dict.fromkeys(map(published_column, columns)) if any(c in row.values for row in rows)]
    lines = [f"| published model | source | {' | '.join(' '.join(column) for column in kept)} |"]
    lines.append(f"|---|---|{'---:|' * len(kept)}")
    for row in rows:
        cells = [f"{row.values[column]:.4f}" if column in row.values else "" for column in kept]
        lines.append(f"| {row.model} | {row.source} | {' | '.join(cells)} |")
    lines += ["", "Protocols, which differ from yours and from each other:", ""]
    notes = {f"- {row.source}: {describe_protocol(row)}{'; ' + row.note if row.note else ''}" for row in rows}
    return "\n".join([*lines, *sorted(notes)]) + "\n"


def own_protocol(results: dict[str, Any]) -> str:
    """Return how a result of `lrnn eval` was scored, in the words of the published tables' protocols."""
    settings = results["settings"]
    told = [f"window {settings['max_length']}", f"dtype {settings['dtype']}"]
    rule, ids = protocol.bos_rule(results)
    told.append(f"bos {rule}" + ("" if ids is None else f", ids {ids}"))
    told.append(f"shots {', '.join(sorted({str(row['shots']) for row in results['metrics']}))}")
    return ", ".join([*told, f"harness lm-eval {results['environment'].get('lm-eval', 'unknown')}"])
