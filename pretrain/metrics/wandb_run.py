"""The record of a run at Weights & Biases: one identity for the life of a run folder, and the whole configuration."""

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import write_json

IDENTITY = "wandb_run.json"  # in the run's folder


def start(project: str, run_dir: Path, resumed: bool, config: dict[str, Any]) -> Any:
    """Start or continue the record of a run, and return it.

    Args:
        project: name of the project.
        run_dir: folder of the run.
        resumed: whether the run continues from a checkpoint.
        config: everything that the run was started with.

    Raises:
        UserError: wandb is not installed, or does not start.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb_project is {project!r} but wandb is not installed: pip install 'lrnn[wandb]'"
        ) from None
    name = os.environ.get("WANDB_NAME", run_dir.resolve().name)
    identity = os.environ.get("WANDB_RUN_ID") or identity_of(run_dir, resumed)
    try:
        run = wandb.init(project=project, id=identity, name=name, dir=str(run_dir), resume="allow", config=config)
    except (wandb.errors.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"log.wandb_project is {project!r} but wandb does not start: {reason}; run `wandb login`, set "
            "WANDB_MODE=offline, or set log.wandb_project="
        ) from None
    # wandb's own step must not fall, which it does when a run resumes or goes back to a checkpoint.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def table(rows: Sequence[tuple[str, str]]) -> Any:
    """Return prompts and texts as a table of wandb."""
    import wandb

    return wandb.Table(columns=["prompt", "text"], data=[list(row) for row in rows])


def identity_of(run_dir: Path, resumed: bool) -> str:
    """Return the id of a run folder's record. It is made at the first start and kept in the folder.

    The copy of a folder gets an id of its own; a folder that was moved keeps its id. In lrnn 0.1.0 the id was the
    folder's name, which other runs may share; a run that was begun so keeps it.
    """
    file, here = run_dir / IDENTITY, str(run_dir.resolve())
    if file.exists():
        known = json.loads(file.read_text())
        if known["run_dir"] == here:
            return known["id"]
        original = Path(known["run_dir"], IDENTITY)
        moved = not original.exists() or json.loads(original.read_text())["id"] != known["id"]
        identity = known["id"] if moved else secrets.token_hex(8)
    else:
        identity = run_dir.resolve().name if resumed and (run_dir / "wandb").is_dir() else secrets.token_hex(8)
    write_json(file, {"id": identity, "run_dir": here})
    return identity
