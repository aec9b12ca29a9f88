"""Write the report of a ladder."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lrnn.files import write_atomically
from lrnn.ladder.cells import Cell
from lrnn.ladder.config import LadderConfig
from lrnn.ladder.measures import FACTS, MEASURES
from lrnn.ladder.report.curves import draw_training
from lrnn.ladder.report.differences import Difference, Differences
from lrnn.ladder.report.document import Picture, to_markdown
from lrnn.ladder.report.gathered import Gathered
from lrnn.ladder.report.intervals import holm
from lrnn.ladder.report.page import to_html
from lrnn.ladder.report.pictures import Drawn, draw_differences, draw_results
from lrnn.ladder.report.sections import RANGES, RESULTS, TRAINING, make_sections
from lrnn.ladder.report.style import DPI
from lrnn.ladder.results import CellResult

TITLE = "Ladder of pretraining runs"


def write_report(ladder: LadderConfig, cells: Sequence[Cell], results: Sequence[CellResult], out: Path) -> None:
    """Write `out/report/{ladder.md, report.html, results.csv, differences.csv}` and the pictures beside them.

    Args:
        ladder: the configuration.
        cells: all cells of the ladder, in any order; those without a result are named as missing.
        results: of some or all cells.
        out: folder of the ladder. Files of an earlier report are replaced.
    """
    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    gathered = Gathered(ladder, results)
    differences = Differences(gathered)
    _write_csv(folder / "results.csv", RESULT_COLUMNS, _result_rows(gathered))
    _write_csv(folder / "differences.csv", DIFFERENCE_COLUMNS, _difference_rows(differences))
    sections = make_sections(gathered, differences, cells)
    for old in folder.glob("*.png"):
        old.unlink()
    for section in sections:
        section.blocks += [_save(folder, *drawn) for drawn in _pictures(section.title, gathered, differences)]
    write_atomically(folder / "ladder.md", to_markdown(TITLE, sections))
    write_atomically(folder / "report.html", to_html(TITLE, sections, folder))


RESULT_COLUMNS = (
    "cell", "size", "arm", "range", "seed", "tokens", "lr", "parameters", "non_embedding_parameters", "measure", "of",
    "at", "value", "stderr", "unit",
)  # fmt: skip
DIFFERENCE_COLUMNS = (
    "contrast", "size", "arm", "range", "against", "tokens", "measure", "of", "at", "difference", "pairs",
    "stderr_own", "df_own", "low_own", "high_own", "stderr_pooled", "df_pooled", "stderr_documents", "documents",
    "low", "high", "p", "p_holm",
)  # fmt: skip


def _result_rows(gathered: Gathered) -> Iterable[Sequence[Any]]:
    """Yield a row for every figure of every cell, and for the facts of its training."""
    for r in gathered.results:
        cell = (r.name, r.size, r.arm, r.range, r.seed, r.tokens, r.lr, r.parameters, r.non_embedding_parameters)
        for f in r.figures:
            yield *cell, f.measure, f.of, f.at, f.value, f.stderr, MEASURES[f.measure].unit
        for name, value in r.training.items():
            if name in FACTS and value is not None:
                yield *cell, name, "training", None, value, None, FACTS[name].unit


def _pictures(section: str, gathered: Gathered, differences: Differences) -> Iterable[Drawn]:
    """Yield the pictures that belong to a section."""
    if not gathered.measured:
        return
    if section == RESULTS:
        yield from draw_results(gathered)
    elif section == RANGES:
        yield from draw_differences(gathered, differences)
    elif section == TRAINING:
        yield from draw_training(gathered)


def _save(folder: Path, file: str, title: str, caption: str, figure: Any) -> Picture:
    figure.savefig(folder / file, dpi=DPI, metadata={"Software": None})
    return Picture(file, title, caption)


def _difference_rows(differences: Differences) -> Iterable[Sequence[Any]]:
    family = differences.family()
    adjusted = dict(zip(map(id, family), holm([_p(d) for d in family]), strict=True))
    for d in differences.all:
        own, interval = d.own_interval, d.interval
        yield (
            d.place.contrast, d.place.size, d.place.arm, d.place.range, d.place.against, d.place.tokens,
            d.quantity.measure, d.quantity.of, d.quantity.at, d.mean, d.seeds,
            d.stderr_own, d.own and d.own.df, own and own.low, own and own.high,
            d.stderr_pooled, d.pooled and d.pooled.df, d.stderr_documents, d.documents,
            interval and interval.low, interval and interval.high, _p(d), adjusted.get(id(d)),
        )  # fmt: skip


def _p(difference: Difference) -> float | None:
    return None if difference.interval is None else difference.interval.p


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; numbers with all their digits, None as an empty field."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
