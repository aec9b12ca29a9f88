"""The averages over tasks that papers print. They differ in the tasks, and in the metric of ARC-challenge."""

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

Row = dict[str, Any]
Members = tuple[tuple[str, str], ...]  # tasks and metrics

SIX = (
    ("lrnn_lambada_openai", "acc"),
    ("lrnn_piqa", "acc"),
    ("lrnn_hellaswag", "acc_norm"),
    ("lrnn_winogrande", "acc"),
    ("lrnn_arc_easy", "acc"),
    ("lrnn_arc_challenge", "acc_norm"),
)
EIGHT = (*SIX, ("lrnn_social_iqa", "acc"), ("lrnn_boolq", "acc"))
NINE = (
    *((task, "acc" if task == "lrnn_arc_challenge" else metric) for task, metric in EIGHT),
    ("lrnn_openbookqa", "acc"),
)
AVERAGES = {
    "commonsense_avg6": SIX,  # GLA, DeltaNet (2406.06484), 2411.12537, DeltaProduct
    "commonsense_avg8": EIGHT,  # gated DeltaNet (2412.06464), table 3
    "commonsense_avg9": NINE,  # 2605.22791, table 2: ARC-challenge without normalisation
}


def score_rows(rows: list[Row]) -> list[Row]:
    """Return the averages of common sense whose tasks were all run."""
    return average_rows(rows, AVERAGES)


def average_rows(rows: list[Row], averages: Mapping[str, Members]) -> list[Row]:
    """Return a row for each average whose tasks were all run, with `parts`: the [task, metric, filter] averaged.

    Its standard error is that of a mean of independent values, sqrt(sum of squared errors) / number of tasks.
    """
    found = {(row["task"], row["metric"]): row for row in rows}
    scores = []
    for name, members in averages.items():
        parts = [found[member] for member in members if member in found]
        if len(parts) < len(members):
            continue
        errors = [part["stderr"] for part in parts]
        scores.append(
            {
                "task": name,
                "metric": members[0][1],
                "filter": "none",
                "value": mean(part["value"] for part in parts),
                "stderr": None if None in errors else math.hypot(*errors) / len(errors),
                "n": sum(part["n"] for part in parts),
                "shots": 0,
                "higher_is_better": True,
                "parts": [[part["task"], part["metric"], part["filter"]] for part in parts],
            }
        )
    return scores
