"""Find the models to evaluate: checkpoints of runs, single checkpoints, and model folders."""

import re
from dataclasses import dataclass
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.model_folder import check_export
from lrnn.pretrain.checkpoint import format as checkpoint

EVERY = re.compile(r"every:([1-9]\d*)")
STEPS = re.compile(r"\d+(,\d+)*")


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        folder: the checkpoint, or the model folder.
        results: holds its result folders.
        root: holds the results of its run, or of the model folder.
    """

    folder: Path
    results: Path
    root: Path


def model_at(folder: Path) -> Model:
    """Return the model of a checkpoint or a model folder, with result folders where `slurm/eval.sbatch` has them."""
    if _is_checkpoint(folder):
        root = folder.parent.parent / "eval"
        return Model(folder, root / folder.name, root)
    return Model(folder, folder / "eval", folder / "eval")


def find_models(given: list[Path], which: str | None) -> list[Model]:
    """Return the models of run folders, checkpoints and model folders, each once.

    Args:
        given: the folders.
        which: the checkpoints of a run: "all", "last", "every:N" or steps such as "1000,5000"; None for all.

    Raises:
        UserError: a folder is none of these, a run has no such checkpoint, or `which` is wrong or without effect.
    """
    if which not in (None, "all", "last") and not EVERY.fullmatch(which) and not STEPS.fullmatch(which):
        raise UserError(f"--checkpoints {which} should be all, last, every:N, or steps such as 1000,5000")
    folders, runs = [], 0
    for path in given:
        folder = path.resolve()
        if any(character in str(folder) for character in "\t\n"):
            raise UserError(f"--eval {path}: a tab or a newline in the path cannot be in a table of jobs")
        if _is_checkpoint(folder):
            if not checkpoint.looks_whole(folder):
                raise UserError(f"--eval {path} is not a whole checkpoint: a file of it is missing or truncated")
            folders.append(folder)
        elif (folder / "checkpoints").is_dir():
            folders += _checkpoints(path, folder, which or "all")
            runs += 1
        elif (folder / "config.json").is_file():
            check_export(folder)
            folders.append(folder)
        else:
            what = "is neither a run with checkpoints, nor a checkpoint, nor a model folder"
            raise UserError(f"--eval {path} {what if folder.is_dir() else 'is not a folder'}")
    if which is not None and not runs:
        raise UserError(f"--checkpoints {which} chooses among the checkpoints of a run, and --eval names no run")
    return [model_at(folder) for folder in dict.fromkeys(folders)]


def _is_checkpoint(folder: Path) -> bool:
    return checkpoint.NAME.match(folder.name) is not None and folder.parent.name == "checkpoints" and folder.is_dir()


def _checkpoints(path: Path, run: Path, which: str) -> list[Path]:
    """Return the chosen checkpoints of a run, oldest first. Broken ones are named, and refused if asked for by step."""
    saved = checkpoint.list_checkpoints(run)
    whole = [folder for folder in saved if checkpoint.looks_whole(folder)]
    for folder in saved:
        if folder not in whole:
            print(f"left out: {folder} is not a whole checkpoint", flush=True)
    if not whole:
        raise UserError(f"--eval {path}: the run has no whole checkpoint yet")
    if which == "all":
        return whole
    if which == "last":
        return whole[-1:]
    steps = {checkpoint.step_of(folder): folder for folder in whole}
    there = f"it has {_shown(sorted(steps))}"
    if every := EVERY.fullmatch(which):
        chosen = [step for step in steps if step % int(every[1]) == 0]
        if not chosen:
            raise UserError(f"--checkpoints {which}: {path} has no checkpoint at a multiple of {every[1]}; {there}")
        return [steps[step] for step in chosen]
    wanted = sorted({int(step) for step in which.split(",")})
    if missing := [step for step in wanted if step not in steps]:
        raise UserError(f"--checkpoints {which}: {path} has no whole checkpoint of step {_shown(missing)}; {there}")
    return [steps[step] for step in wanted]


def _shown(steps: list[int]) -> str:
    texts = [str(step) for step in steps]
    return ", ".join(texts if len(texts) <= 10 else [*texts[:4], "...", *texts[-4:]])
