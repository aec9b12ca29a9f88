"""The pictures of the page, as SVG text: metrics by checkpoint, accuracy by length, perplexity by position."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrnn.eval import length_plot
from lrnn.eval.suites import protocol
from lrnn.eval.suites.collect import Collection, column, model_key, run_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4  # panels per row


def by_checkpoint(collection: Collection) -> str | None:
    """Return a panel per metric with its value by training step, a line per run; None if no run has two checkpoints.

    Checkpoints belong to one run if they were trained with one configuration.
    """
    runs: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    names: dict[str, str] = {}
    for path, results in collection.found:
        training = results["model"].get("training") or {}
        if "step" in training and "run_config_sha256" in training:
            run = training["run_config_sha256"]
            names.setdefault(run, run_name(path, results))
            for row in results["metrics"]:
                point = (training["step"], row["value"], row["stderr"] or 0.0)
                runs.setdefault(run, {}).setdefault(column(row, results).replace(" ", "\n", 1), []).append(point)
    runs = {run: {name: sorted(set(points)) for name, points in metrics.items()} for run, metrics in runs.items()}
    panels = dict.fromkeys(name for metrics in runs.values() for name, points in metrics.items() if len(points) > 1)
    if not panels:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = length_plot.panels(len(panels), COLUMNS, sharey=False)
    for axis, name in zip(axes, panels, strict=True):
        for run, metrics in runs.items():
            if name in metrics:
                steps, values, errors = zip(*metrics[name], strict=True)
                axis.errorbar(steps, values, errors, marker=".", capsize=2, label=names[run])
        axis.set(title=name, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, axes, "checkpoint")


def by_length(collection: Collection) -> str | None:
    """Return a panel per task with accuracy by length, a line per model; None without such results."""
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _, results in collection.found:
        label = collection.name(model_key(results["model"]))
        for row in results.get("by_length") or []:
            title = " ".join(str(row[key]) for key in ("task", "kind") if row.get(key))
            if labels := protocol.labels(results):
                title += f",\n{', '.join(labels)}"
            curves.setdefault(title, {}).setdefault(label, []).append(row)
    if not curves:
        return None
    figure, axes = length_plot.panels(len(curves), COLUMNS)
    for axis, (title, models) in zip(axes, curves.items(), strict=True):
        for model, rows in models.items():
            lengths = [row["length"] for row in rows]
            errors = [row.get("stderr") or 0 for row in rows]
            axis.errorbar(lengths, [row["accuracy"] for row in rows], errors, marker=".", capsize=2, label=model)
            if all(row.get("floor") is not None for row in rows):
                axis.plot(lengths, [row["floor"] for row in rows], color="grey", ls=":", lw=1)
        length_plot.by_length(axis, title, next(iter(models.values()))[0].get("unit") or "length")
    return _svg(figure, axes, "length")


def by_position(found: list[tuple[Path, dict[str, Any]]]) -> str | None:
    """Return a panel per result of `lrnn position` in `found` with perplexity by position, or None."""
    curves = [(path, results) for path, results in found if "curves" in results]
    if not curves:
        return None
    figure, axes = length_plot.panels(len(curves), COLUMNS, sharey=False)
    for axis, (path, results) in zip(axes, curves, strict=True):
        for curve in results["curves"]:
            known = [row for row in curve if row["ppl"] is not None]
            middle = [(row["from"] * row["to"]) ** 0.5 for row in known]
            axis.plot(middle, [row["ppl"] for row in known], label=known[0]["name"] if known else None)
        axis.set(title=path.parent.name, xlabel="position in tokens", ylabel="perplexity")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
    return _svg(figure, axes, "position")


def _svg(figure: Any, axes: list["Axes"], name: str) -> str:
    """Return the figure as an SVG element; `name` keeps its ids apart from those of the page's other pictures."""
    import matplotlib

    for axis in axes:
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, ncols=4)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids of groups are the same in every figure of matplotlib, and a page may have an id only once.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
