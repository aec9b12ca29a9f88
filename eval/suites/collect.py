"""Collect many results in one table, with a row for each model and a column for each metric."""

import json
from pathlib import Path
from typing import Any

from lrnn.errors import UserError


def collect(folders: list[Path]) -> str:
    """Return a Markdown table of every results.json of `lrnn eval` below `folders`, ordered by training step if known.

    Raises:
        UserError: a folder holds no results, or two results of a model give different values for one metric.
    """
    rows: dict[tuple[str, int, str], dict[str, str]] = {}
    columns: list[str] = []
    for path, results in [found for folder in folders for found in _results_below(folder)]:
        row = rows.setdefault(_model(results["model"]), {})
        for metric in results["metrics"]:
            name, cell = _column(metric, results["limit"]), _cell(metric)
            if row.setdefault(name, cell) != cell:
                raise UserError(f"{path} says {name} = {cell}, other results of the same model say {row[name]}")
            if name not in columns:
                columns.append(name)
    lines = [f"| model | step | {' | '.join(columns)} |", f"|---|---:|{'---:|' * len(columns)}"]
    for (path_, step, _), row in sorted(rows.items(), key=lambda item: (item[0][1], item[0])):
        cells = [path_, str(step) if step >= 0 else "", *(row.get(name, "") for name in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _results_below(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    # A name that begins with a dot belongs to a result that is being written or replaced.
    paths = [p for p in folder.rglob("results.json") if not any(part.startswith(".") for part in p.parts[-2:])]
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(paths)]
    suites = [(path, results) for path, results in found if "metrics" in results]  # `lrnn position` writes curves
    if not suites:
        raise UserError(f"{folder} holds no results.json at any depth; give folders written by `lrnn eval`")
    return suites


def _model(model: dict[str, Any]) -> tuple[str, int, str]:
    """Return what identifies a row: the folder's name, the step (-1 if unknown), and checksums of the weights."""
    step = (model.get("training") or {}).get("step", -1)
    return Path(model["path"]).name, step, json.dumps(model["weights_sha256"], sort_keys=True)


def _column(metric: dict[str, Any], limit: int | None) -> str:
    name = f"{metric['task']} {metric['metric']}"
    name += "" if metric["filter"] == "none" else f" ({metric['filter']})"
    return name if limit is None else f"{name}, first {limit}"


def _cell(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.4f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")
