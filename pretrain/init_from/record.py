"""What a checkpoint keeps of where its run began, by which a run resumes without the folder."""

import json
import os
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.paths import seen_from
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.settings import read_json

NAME = "init_from.json"  # in a checkpoint


def make_record(init_from: str, run_dir: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the record.

    Args:
        init_from: the path, as the run's configuration has it.
        run_dir: folder of the run.
        facts: of the weights, see `InitialWeights.facts`.
    """
    return {"given": init_from, **_places(init_from, run_dir), **facts}


def _places(init_from: str, run_dir: str) -> dict[str, str]:
    return {"folder": os.path.realpath(init_from), "from_run_dir": seen_from(init_from, Path(run_dir))}


def read_record(saved: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint, or None if its run began with fresh weights."""
    return read_json(saved / NAME, "record") if (saved / NAME).is_file() else None


def texts_of(record: dict[str, Any] | None) -> dict[str, str]:
    """Return the file that keeps a record in a checkpoint, text by name."""
    return {} if record is None else {NAME: json.dumps(record, indent=1) + "\n"}


def newest_with_model(run_dir: str) -> Path | None:
    """Return the newest checkpoint whose `config.json` is intact, None if there is no checkpoint. Weights are not read.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    saved = checkpoint.list_checkpoints(Path(run_dir))
    whole = (folder for folder in reversed(saved) if checkpoint.holds(folder, "config.json"))
    return next(whole, None) or (checkpoint.find_newest(Path(run_dir)) if saved else None)


def check_begin(saved: Path, init_from: str, run_dir: str) -> None:
    """Raise UserError unless the run of a checkpoint began with the weights that `init_from` names.

    They are not read any more when the run resumes, so another value would have no effect. A folder that is gone or
    moved is no reason to refuse: its path is compared as it was given, from `run_dir`, and on the whole file system.
    """
    record = read_record(saved)
    if record is None:
        raise UserError(
            f"run_dir {run_dir} has checkpoints (the newest is {saved.name}) of a run that began with random weights, "
            f"so init_from {init_from} would have no effect; choose another run_dir, or leave out init_from to resume "
            "that run"
        )
    places = _places(init_from, run_dir)
    same = init_from == record["given"] or any(places[name] == record[name] for name in places)
    if not same:
        raise UserError(
            f"run_dir {run_dir} has checkpoints (the newest is {saved.name}) of a run that began from "
            f"{record['given']}, so init_from {init_from} would have no effect; choose another run_dir, or restore "
            f"init_from {record['given']} to resume that run"
        )
