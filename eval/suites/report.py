"""Results of a suite on disk: results.json (ours), table.md, and lm-eval's own results and samples, all or nothing.

Tasks with documents of several lengths add by_length.csv and by_length.png.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.eval.statistics import AGGREGATES, bootstrap_stderr, is_aggregate
from lrnn.eval.suites import sections
from lrnn.files import replace_folder

Raw = dict[str, Any]


def metric_rows(raw: Raw) -> list[Raw]:
    """Return a row per task, metric and filter, with a standard error, from the result of lm-eval's `simple_evaluate`.

    Metrics of a single length are left to `sections.length_rows`.
    """
    rows = []
    for task, values in {**raw["results"], **raw.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or sections.is_by_length(metric):
                continue
            if not isinstance(value, (int, float)):
                continue  # lm-eval's own results keep it
            row = {"task": task, "metric": metric, "filter": filter_name, "value": float(value)}
            stderr: Any = values.get(f"{metric}_stderr,{filter_name}")
            if metric in AGGREGATES and task in raw["samples"]:
                # A document may have no value of a metric, and a task may call a mean "perplexity".
                own = [s[metric] for s in raw["samples"][task] if s["filter"] == filter_name and metric in s]
                if is_aggregate(metric, own, value):
                    stderr = bootstrap_stderr(metric, np.array(own, dtype=np.float64))
            is_number = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            row["stderr"] = float(stderr) if is_number else None
            rows.append(row | (_of_group(raw, row) if task in raw.get("groups", {}) else _of_task(raw, row)))
    return rows


def _of_task(raw: Raw, row: Raw) -> Raw:
    """Return what else the row of a task holds."""
    task = row["task"]
    shots = (raw["configs"][task].get("metadata") or {}).get("shots", raw["n-shot"][task])
    better = (raw["higher_is_better"].get(task) or {}).get(row["metric"])
    return {"n": raw["n-samples"][task]["effective"], "shots": shots, "higher_is_better": better}


def _of_group(raw: Raw, row: Raw) -> Raw:
    """Return what else the row of a group holds: `tasks`, those that it aggregates, and facts that they share.

    `weight_by_size` is whether it is the mean over their documents instead of over tasks.
    """
    key, tasks, names = f"{row['metric']},{row['filter']}", [], list(raw["group_subtasks"][row["task"]])
    while names:
        name = names.pop(0)
        names = [*raw["group_subtasks"].get(name, []), *names]
        tasks += [name] if key in raw["results"].get(name, {}) and name in raw["samples"] else []
    parts = [_of_task(raw, {**row, "task": task}) for task in tasks]
    shots = sorted({part["shots"] for part in parts}, key=str)
    better = {part["higher_is_better"] for part in parts}
    return {
        "n": sum(part["n"] for part in parts),
        "shots": shots[0] if len(shots) == 1 else f"{shots[0]} to {shots[-1]}",
        "higher_is_better": better.pop() if len(better) == 1 else None,
        "tasks": tasks,
        "weight_by_size": raw["weight_by_size"][row["task"]][row["metric"]],
    }


def markdown_table(results: Raw) -> str:
    """Return the results as Markdown; `+-` is one standard error over documents."""
    lines = [f"# {results['suite']}: {results['model']['path']}", "", *metrics_table(results)]
    if results["by_length"]:
        lines += ["", sections.markdown_tables(results["by_length"]).rstrip()]
    return "\n".join(lines) + "\n"


def metrics_table(results: Raw) -> list[str]:
    """Return the lines of a table of the metrics, with what was left out above it."""
    lines = []
    if results["limit"] is not None:
        limit = results["limit"]
        share = f"{limit:g} documents" if limit >= 1 else f"{limit:.4g} of the documents"
        lines += [f"Only the first {share} of every task: not comparable with complete runs.", ""]
    if results["left_out"]:
        lines += [f"Left out: {', '.join(results['left_out'])}.", ""]
    if results.get("cut"):  # results before it was recorded do not have it
        lines += [cut_note(results["cut"], results["settings"]["max_length"]), ""]
    lines += ["| task | metric | | value | +- | n | shots |", "|---|---|---|---:|---:|---:|---:|"]
    for row in results["metrics"]:
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        arrow = {True: "higher is better", False: "lower is better", None: ""}[row["higher_is_better"]]
        stderr = "n/a" if row["stderr"] is None else f"{row['stderr']:.4f}"
        cells = (row["task"], name, arrow, f"{row['value']:.4f}", stderr, row["n"], row["shots"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def cut_note(cut: dict[str, int], max_length: int) -> str:
    """Return a sentence on prompts that exceed the context, by task the number of them."""
    tasks = ", ".join(f"{number} of {task}" for task, number in cut.items())
    return f"Prompts are cut from the left, because they exceed the context of {max_length:,} tokens: {tasks}."


def write(out: Path, results: Raw, raw: Raw) -> None:
    """Write the folder `out`, whole or not at all. Earlier results in it are replaced."""
    with replace_folder(out) as new:
        _fill(new, results, raw)


def _fill(new: Path, results: Raw, raw: Raw) -> None:
    for task, samples in raw["samples"].items():
        with (new / f"samples_{task}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(_dump(sample) for sample in samples)
    (new / "lm_eval_results.json").write_text(
        _dump({k: v for k, v in raw.items() if k != "samples"}, indent=2), encoding="utf-8"
    )
    if results["by_length"]:
        sections.write(new, results["by_length"])
    (new / "table.md").write_text(markdown_table(results), encoding="utf-8")
    (new / "results.json").write_text(_dump(results, indent=2), encoding="utf-8")


def _dump(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options) + "\n"
