"""The curves of runs, as `lrnn plot` draws them: read from records, smoothed, and joined over seeds with a band."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lrnn.errors import UserError
from lrnn.parsing import parse_yaml
from lrnn.pretrain.changes import FREE, flatten
from lrnn.records import HELDOUT_OF_CORPUS, events_by_step, read_metrics

Band = Literal["minmax", "stderr"]
Values = npt.NDArray[np.float64]
# Line style of each mark.
MARKS = {"resumed": ":", "loss_spike": "--", "skipped_step": "-", "rollback": "-.", "stage": (0, (8, 2))}


@dataclass
class Curve:
    """Values by step. `errors` are the standard errors that a value has by itself, NaN where it has none."""

    steps: list[int]
    values: Values
    errors: Values | None = None


@dataclass
class Records:
    """What the records of a run show.

    Attributes:
        name: the folder as it was given.
        by_step: the records by step, of a repeated step the later one.
        marked: the steps of each event in `MARKS`.
        scores: the events of evaluations by step.
    """

    name: str
    by_step: dict[int, dict[str, Any]]
    marked: dict[str, list[int]]
    scores: dict[int, dict[str, Any]]

    def curve(self, key: str) -> Curve:
        """Return the values of a key, where there are any."""
        points = [(step, record[key]) for step, record in self.by_step.items() if record.get(key) is not None]
        return Curve([step for step, _ in points], np.array([value for _, value in points], dtype=np.float64))

    @property
    def corpora(self) -> list[str]:
        """Return the corpora whose held-out losses were measured one by one."""
        keys = (key for record in self.by_step.values() for key in record if key.startswith(HELDOUT_OF_CORPUS))
        return list(dict.fromkeys(key.removeprefix(HELDOUT_OF_CORPUS) for key in keys))

    def score(self, name: tuple[str, str]) -> Curve:
        """Return the values of a task's metric, where there are any."""
        task, metric = name
        points = []
        for step, event in self.scores.items():
            value = event["scores"].get(task, {}).get(metric)
            if value is not None:
                points.append((step, value, event["stderr"].get(task, {}).get(metric)))
        steps, values, errors = zip(*points, strict=True) if points else ((), (), ())
        return Curve(list(steps), np.array(values, dtype=np.float64), np.array(errors, dtype=np.float64))


def read_run(run_dir: Path) -> Records:
    """Return the records of a run. Raise UserError if there is no step yet."""
    records = read_metrics(run_dir)
    by_step, marked = split_records(records)
    if not by_step:
        raise UserError(f"{run_dir}/metrics.jsonl holds no step yet")
    return Records(str(run_dir), by_step, marked, events_by_step(records, "eval"))


def split_records(records: list[dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], dict[str, list[int]]]:
    """Return the records by step (of a repeated step the later one), and the steps of each event in `MARKS`."""
    by_step: dict[int, dict[str, Any]] = {}
    marked: dict[str, list[int]] = {name: [] for name in MARKS}
    for record in records:
        event = record.get("event")
        if event == "start":
            if record["resumed"]:
                marked["resumed"].append(record["step"])
        elif event in marked and (event != "stage" or record["stage"] > 1):  # the first begins where the run does
            marked[event].append(record["step"])
        elif event is None:
            by_step[record["step"]] = record
    return dict(sorted(by_step.items())), marked


@dataclass
class Group:
    """Runs that are one line of the picture: a single one, or those that differ by their seed."""

    name: str
    runs: list[Records]

    def joined(self, get: Callable[[Records], Curve], smoothing: float = 0.0) -> tuple[list[int], Values]:
        """Return the steps that all runs have, and the values [runs, steps], each run smoothed by itself."""
        curves = [get(run) for run in self.runs]
        steps = sorted(set(curves[0].steps).intersection(*(curve.steps for curve in curves[1:])))
        rows = []
        for curve in curves:
            known = dict(zip(curve.steps, smooth(curve.values, smoothing), strict=True))
            rows.append([known[step] for step in steps])
        return steps, np.array(rows, dtype=np.float64).reshape(len(curves), len(steps))


def group_by_seed(runs: Sequence[Records]) -> list[Group]:
    """Return runs in groups whose configurations differ by `seed` alone, or by keys that change no result.

    Raises:
        UserError: a run's folder has no run.yaml to compare.
    """
    groups: dict[str, list[Records]] = {}
    for run in runs:
        groups.setdefault(_without_seed(Path(run.name)), []).append(run)
    return [Group(common_name([run.name for run in members]), members) for members in groups.values()]


def _without_seed(run_dir: Path) -> str:
    file = run_dir / "run.yaml"
    if not file.is_file():
        raise UserError(f"--band compares the configurations of runs, and {run_dir} holds no run.yaml")
    flat = flatten(parse_yaml(file.read_text(encoding="utf-8"), str(file)).value)
    kept = {key: value for key, value in flat.items() if key != "seed" and not _is_free(key)}
    return repr(sorted(kept.items(), key=lambda item: item[0]))


def _is_free(key: str) -> bool:
    words = key.split(".")
    return any(".".join(words[:n]) in FREE for n in range(1, len(words) + 1))


def common_name(names: Sequence[str]) -> str:
    """Return what the names of a group's runs have in common at their beginning, without "seed", and their number."""
    if len(names) == 1:
        return names[0]
    start = "".join(letters[0] for letters in takewhile(lambda same: len(set(same)) == 1, zip(*names, strict=False)))
    start = start.rstrip("-_./ ").removesuffix("seed").rstrip("-_./ ")
    return f"{start or names[0]} ({len(names)} seeds)"


def smooth(values: Values, weight: float) -> Values:
    """Return TensorBoard's exponential moving average: s = weight * s + (1 - weight) * value, over 1 - weight^n."""
    if weight == 0:
        return values
    smoothed, last, known = [], 0.0, 0
    for value in values:
        if np.isfinite(value):  # The others are gaps, as in TensorBoard.
            last, known = weight * last + (1 - weight) * value, known + 1
            value = last / (1 - weight**known)
        smoothed.append(value)
    return np.array(smoothed, dtype=np.float64)


def limits(values: Values, band: Band) -> tuple[Values, Values]:
    """Return the lower and the upper end of a band over the rows of `values` [runs, steps]."""
    if band == "minmax":
        return values.min(0), values.max(0)
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    return mean - error, mean + error
