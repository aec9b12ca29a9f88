"""Report perplexity by position: curves with bands, and their files results.json, position.csv, table.md and a plot."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.eval.statistics import RESAMPLES, SEED, interval, resampled_means
from lrnn.files import replace_folder

MARK_STYLE = {"ls": "--", "lw": 1, "alpha": 0.7}


@dataclass(frozen=True)
class Curve:
    """Mean negative log-likelihood by bin, or a difference of two, in nats per token: float64 [K], NaN where unknown.

    `low` and `high` are the 95% band of a bootstrap over documents.
    """

    name: str
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves(
    names: list[str], sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[list[Curve], list[Curve]]:
    """Return a curve per model, and per model but the first the curve of its difference from the first.

    Differences are paired by document.

    Args:
        names: names of the M models.
        sums: float64 [M, D, K], from `sum_by_bin`.
        counts: int64 [D, K], from `sum_by_bin`; the same for all models.
        resamples: number of bootstrap draws.
        seed: seed of the draws.
    """
    draws = resampled_means(sums, counts, resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(1) / counts.sum(0)
        differences, difference_draws = means[1:] - means[0], draws[1:] - draws[0]
    return (
        [Curve(name, mean, *interval(d)) for name, mean, d in zip(names, means, draws, strict=True)],
        [
            Curve(f"{name} - {names[0]}", mean, *interval(d))
            for name, mean, d in zip(names[1:], differences, difference_draws, strict=True)
        ],
    )


def perplexity(nll: np.ndarray) -> np.ndarray:
    """Return exp of nats per token, infinite where that exceeds float64."""
    with np.errstate(over="ignore"):
        return np.exp(nll)


def rows(curve: Curve, edges: np.ndarray, counts: np.ndarray, *, ppl: bool) -> list[dict[str, Any]]:
    """Return a row per bin with tokens, with None for values that are unknown or infinite."""
    columns = {"nll" if ppl else "difference": curve.mean, "low": curve.low, "high": curve.high}
    if ppl:
        both = {"ppl": curve.mean, "ppl_low": curve.low, "ppl_high": curve.high}
        columns |= {name: perplexity(values) for name, values in both.items()}
    found = []
    for k in np.flatnonzero(counts.sum(0)):
        row = {"name": curve.name, "from": int(edges[k]) + 1, "to": int(edges[k + 1])}
        row |= {"tokens": int(counts[:, k].sum()), "documents": int((counts[:, k] > 0).sum())}
        row |= {name: _finite(values[k]) for name, values in columns.items()}
        found.append(row)
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def markdown_table(results: dict[str, Any]) -> str:
    """Return the results as Markdown: a line per bin, perplexities and differences with their 95% bands."""
    data, settings = results["data"], results["settings"]
    lines = [
        f"# perplexity by position: {data['documents']}",
        "",
        f"{data['taken']:,} {'joined documents' if settings['join'] else 'documents'}, each read from its beginning, "
        f"up to {settings['max_length']:,} tokens; in brackets the 95% interval of a bootstrap over documents. "
        "Differences are in nats per token, paired by document.",
        *(f"\nNote: {note}." for note in results["notes"]),
        "",
    ]
    blocks = [*results["curves"], *results["differences"]]
    names = [block[0]["name"] for block in blocks]
    lines += [f"| positions | tokens | documents | {' | '.join(names)} |", f"|---:|---:|---:|{'---:|' * len(names)}"]
    for at, first in enumerate(blocks[0]):
        cells = [f"{first['from']:,} to {first['to']:,}", f"{first['tokens']:,}", f"{first['documents']:,}"]
        for block in blocks:
            ppl = "ppl" in block[at]
            keys, form = (("ppl", "ppl_low", "ppl_high"), ".3f") if ppl else (("difference", "low", "high"), "+.4f")
            mean, low, high = ("n/a" if block[at][k] is None else format(block[at][k], form) for k in keys)
            cells.append(f"{mean} [{low}, {high}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(out: Path, results: dict[str, Any]) -> None:
    """Write the folder `out`, whole or not at all. Earlier results in it are replaced."""
    with replace_folder(out) as new:
        _fill(new, results)


def _fill(new: Path, results: dict[str, Any]) -> None:
    for name, blocks in (("position.csv", results["curves"]), ("difference.csv", results["differences"])):
        if blocks:
            with (new / name).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(blocks[0][0]))
                writer.writeheader()
                writer.writerows(row for block in blocks for row in block)
    plot(new / "position.png", results)
    (new / "table.md").write_text(markdown_table(results), encoding="utf-8")
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    (new / "results.json").write_text(text + "\n", encoding="utf-8")


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot perplexity over position, a line and a band per model, and below it the paired differences, if any."""
    from matplotlib.figure import Figure  # not pyplot, whose state and backend are the user's

    differences = results["differences"]
    n = 2 if differences else 1
    figure = Figure(figsize=(9, 5 * n), layout="constrained")
    axes = figure.subplots(n, 1, sharex=True, squeeze=False)
    for i, block in enumerate(results["curves"]):
        _line(axes[0, 0], block, ("ppl", "ppl_low", "ppl_high"), f"C{i % 10}")
    if any(row["ppl"] is not None for block in results["curves"] for row in block):  # an empty axis has no logarithm
        _set_log_scale(axes[0, 0])
    axes[0, 0].set(ylabel="perplexity", title=f"{results['data']['taken']:,} documents, 95% bands")
    if differences:
        for i, block in enumerate(differences, start=1):
            _line(axes[1, 0], block, ("difference", "low", "high"), f"C{i % 10}")
        axes[1, 0].axhline(0, color="black", lw=0.8)
        axes[1, 0].set(ylabel="difference, nats per token", title="paired by document")
    for axis in axes[:, 0]:
        for length in sorted({m["training_length"] for m in results["models"]} - {None}):
            axis.axvline(length, color="black", label=f"training length {length:,}", **MARK_STYLE)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[-1, 0].set_xlabel("position (tokens before)")
    figure.savefig(path, dpi=120)


def _set_log_scale(axis: Any) -> None:
    """Give an axis with data a logarithmic y scale with labels that have room: few of each decade if there are many."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.7:
        axis.yaxis.set_major_locator(MaxNLocator(8))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,), numticks=12))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _line(axis: Any, block: list[dict[str, Any]], keys: tuple[str, str, str], color: str) -> None:
    x = [math.sqrt(row["from"] * row["to"]) for row in block]
    mean, low, high = (np.array([row[key] for row in block], dtype=np.float64) for key in keys)  # None becomes NaN
    axis.plot(x, mean, color=color, lw=1.5, marker=".", ms=4, label=block[0]["name"])
    axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
