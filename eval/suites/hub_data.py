"""Data sets of the Hugging Face hub that no package on PyPI holds: fetched once with `datasets`, then read offline.

They are read from the cache of `datasets` ($HF_HOME), where lm-eval looks too, or from local copies of the hub's
repositories: `$LRNN_EVAL_DATASETS/allenai/sciq` for allenai/sciq, as `hf download` and `git clone` write them. All of
them are in a form without a loading script, which `datasets` refuses to run.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lrnn.errors import UserError, first_line
from lrnn.eval.retrieval.windows import COLUMNS

FOLDER = "LRNN_EVAL_DATASETS"  # the environment variable that --data-folder sets


@dataclass(frozen=True)
class HubData:
    """A split of a data set of the hub, and the columns that tasks read."""

    repository: str
    config: str | None
    split: str
    columns: tuple[str, ...]


JRT = {  # the prompts of 2407.05483
    "swde": "based-swde-v2",
    "fda": "based-fda",
    "squad": "based-squad",
    "triviaqa": "based_triviaqa",
    "nq": "based_nq_2048",
    "drop": "based_drop",
}
HUB_DATA = {
    "wikitext": HubData("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", ("page",)),
    "sciq": HubData(
        "allenai/sciq",
        None,
        "test",
        ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    "mathqa": HubData("regisss/math_qa", None, "test", ("Problem", "options", "correct")),
    **{name: HubData(f"hazyresearch/{JRT[name]}", None, "validation", columns) for name, columns in COLUMNS.items()},
}
TASKS = {"lrnn_wikitext": "wikitext", "lrnn_sciq": "sciq", "lrnn_mathqa": "mathqa"}  # the tasks that need them
TASKS |= {f"lrnn_recall_{name}": name for name in JRT}


def hub_data(hub: str, **_: Any) -> dict[str, Any]:
    """Return a data set by its name in `HUB_DATA`. lm-eval passes a task's `dataset_kwargs` and `metadata`."""
    return {"test": load(hub)}


def load(name: str) -> Any:
    """Return a data set. Raise UserError if it is missing, or lacks a column."""
    wanted = HUB_DATA[name]
    try:
        found = _load(name, os.environ.get(FOLDER))
    except (OSError, ValueError) as error:
        raise UserError(f"{_where(wanted)} cannot be read: {first_line(error)}") from error
    missing = [column for column in wanted.columns if column not in found.column_names]
    if missing:
        has = ", ".join(found.column_names)
        raise UserError(f"{_where(wanted)}, split {wanted.split}, has no column {missing[0]!r}; it has {has}")
    return found


def missing_tasks(tasks: Iterable[str]) -> list[str]:
    """Return those of the tasks whose data set is neither in the cache nor in the local folder."""
    return [task for task in tasks if task in TASKS and not _is_there(TASKS[task])]


def describe_missing(tasks: list[str], suite: str) -> str:
    """Return the message for tasks without data: which data sets, and the command that gets them."""
    names = ", ".join(f"{HUB_DATA[TASKS[task]].repository} ({task})" for task in tasks)
    folder = os.environ.get(FOLDER)
    where = f"in {folder}" if folder else "in the cache of datasets ($HF_HOME)"
    return (
        f"data sets of the Hugging Face hub are not {where}: {names}; run `lrnn eval --fetch --suite {suite}` where it "
        "can be reached, name a folder of copies with --data-folder, or add --skip-missing-data to leave these out"
    )


def fetch(names: Iterable[str]) -> None:
    """Download data sets into the cache of `datasets`. Raise UserError if the hub cannot be reached."""
    import datasets

    for name in names:
        wanted = HUB_DATA[name]
        print(f"downloading {wanted.repository} from the Hugging Face hub ...", flush=True)
        try:
            found = datasets.load_dataset(wanted.repository, wanted.config, split=wanted.split)
        except (OSError, ValueError) as error:
            raise UserError(f"could not download {wanted.repository}: {first_line(error)}") from error
        print(f"  {name}: {len(found)} rows")


def _is_there(name: str) -> bool:
    folder = os.environ.get(FOLDER)
    if folder and (Path(folder) / HUB_DATA[name].repository).is_dir():
        return True  # if it is damaged, the task says so
    try:
        _load(name, folder)
    except (OSError, ValueError):
        return False
    return True


@cache
def _load(name: str, folder: str | None) -> Any:
    import datasets

    wanted = HUB_DATA[name]
    path = wanted.repository
    if folder:
        path = str(Path(folder) / wanted.repository)
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} is not a folder")
    return datasets.load_dataset(path, wanted.config, split=wanted.split)


def _where(wanted: HubData) -> str:
    folder = os.environ.get(FOLDER)
    return str(Path(folder) / wanted.repository) if folder else f"the data set {wanted.repository}"
