"""Write the HTML page of a collection of results."""

from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.eval.published.beside import choose, describe_protocol, own_protocol, published_column
from lrnn.eval.report_page import curves
from lrnn.eval.report_page.samples import read_samples
from lrnn.eval.suites.collect import Collection, ModelKey, all_results_below, model_key, read_collection
from lrnn.eval.suites.compare import differences
from lrnn.files import write_atomically

TEMPLATE = "page.html.j2"
CAPTIONS = {
    "by checkpoint": "Bars are one standard error.",
    "by length": "Accuracy; bars are one standard error, dotted lines the best constant answer.",
    "by position": "Perplexity of the token at each position of a document.",
}


def write_page(folders: list[Path], out: Path, published: list[str] | None = None) -> None:
    """Write one HTML page of all results below `folders`.

    Args:
        folders: searched for results of `lrnn eval` and `lrnn position`.
        out: the page, replaced if it exists.
        published: words that choose published results to show too, empty for all that have a metric in common; None
            for none.

    Raises:
        UserError: there are no results, they contradict each other, or `out` cannot be written.
    """
    collection = read_collection(folders)
    everything = [found for folder in folders for found in all_results_below(folder)]
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--html {out} must be a file in a folder that exists")
    html = render(collection, everything, published)
    write_atomically(out, html)


def render(collection: Collection, everything: list[tuple[Path, dict[str, Any]]], published: list[str] | None) -> str:
    """Return the page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    drawn = {
        "by checkpoint": curves.by_checkpoint(collection),
        "by length": curves.by_length(collection),
        "by position": curves.by_position(everything),
    }
    # matplotlib escapes the texts in its pictures.
    pictures = [
        {"id": name.replace(" ", "-"), "name": name.capitalize(), "caption": CAPTIONS[name], "svg": Markup(svg)}
        for name, svg in drawn.items()
        if svg is not None
    ]
    pairs = _differences(collection)
    rows = _rows(collection) + ([] if published is None else _published(collection, published))
    sections = [("results", "Results"), *([("differences", "Differences")] if pairs else [])]
    sections += [*((picture["id"], picture["name"]) for picture in pictures), ("samples", "Samples")]
    names = list(dict.fromkeys(collection.labels[key] for key in collection.rows))
    environment = Environment(
        loader=PackageLoader("lrnn.eval.report_page", ""), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        title=f"Results of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}",
        sections=[{"id": section, "name": name} for section, name in sections],
        columns=_columns(collection),
        rows=rows,
        protocols=list(dict.fromkeys(protocol for row in rows for protocol in row["protocols"])),
        differences=pairs,
        pictures=pictures,
        samples=[
            {
                "name": f"{collection.name(model_key(results['model']))}, {path.parent.name}",
                "tasks": read_samples(path.parent),
            }
            for path, results in collection.found
        ],
    )


def _columns(collection: Collection) -> list[dict[str, str]]:
    return [
        {"name": name, "detail": f"n {metric.get('n')}, {metric.get('shots')} shots"}
        for name, metric in collection.columns.items()
    ]


def _rows(collection: Collection) -> list[dict[str, Any]]:
    protocols: dict[ModelKey, dict[str, None]] = {}
    for _, results in collection.found:
        protocols.setdefault(model_key(results["model"]), {})[own_protocol(results)] = None
    return [
        {
            "model": collection.labels[key],
            "step": key[1] if key[1] >= 0 else "",
            "cells": [row.get(column, "") for column in collection.columns],
            "protocols": list(protocols[key]),
            "published": False,
        }
        for key, row in collection.rows.items()
    ]


def _published(collection: Collection, words: list[str]) -> list[dict[str, Any]]:
    columns = [(metric["task"], metric["metric"]) for metric in collection.columns.values()]
    names = [published_column(column) for column in columns]
    return [
        {
            "model": row.model,
            "step": "",
            "cells": [f"{row.values[name]:.4f}" if name in row.values else "" for name in names],
            "protocols": [f"{row.source}: {describe_protocol(row)}" + (f"; {row.note}" if row.note else "")],
            "published": True,
        }
        for row in choose(words, columns)
    ]


def _differences(collection: Collection) -> list[dict[str, Any]]:
    """Return the differences of each model from the first, over the suites that both have."""
    folders: dict[ModelKey, dict[str, Path]] = {}
    for path, results in collection.found:
        folders.setdefault(model_key(results["model"]), {})[results["suite"]] = path.parent
    first, *others = collection.rows
    pairs = []
    for other in others:
        rows, notes = [], []
        for suite, folder in folders[other].items():
            if suite in folders[first]:
                try:
                    rows += differences(folders[first][suite], folder)
                except UserError as error:
                    notes.append(str(error))
        if rows or notes:
            pairs.append(
                {"first": collection.name(first), "second": collection.name(other), "rows": rows, "notes": notes}
            )
    return pairs
