"""The parts that result folders share: results.json, and the rule on which folders may be replaced."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from lrnn import environment
from lrnn.errors import UserError

SCHEMA_VERSION = 1
PACKAGES = ("lm-eval", "transformers", "datasets", "tokenizers", "numpy")  # their versions are recorded too


def check_output(out: Path) -> None:
    """Raise UserError unless `out` can be written, and is absent, empty or holds earlier results, to be replaced."""
    if os.path.exists(out) and not out.is_dir():
        raise UserError(f"--out {out} is a file; it must be a folder")
    _check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "results.json").is_file():
        raise UserError(f"--out {out} holds other files and no results.json; choose a new or empty folder")


def _check_writable(out: Path) -> None:
    """Raise UserError unless the folder can be made and replaced."""
    # os.path.exists is false for what is below an unreadable folder, where Path.exists raises.
    place = next(folder for folder in out.absolute().parents if os.path.exists(folder))
    if not place.is_dir():
        raise UserError(f"--out {out} cannot be a folder: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written, because {place} is read-only; name another folder with --out")


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a results.json of `lrnn eval` or `lrnn position`.

    Raises:
        UserError: it cannot be read, or an lrnn with another form of results wrote it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the evaluation again") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} holds no JSON object: it is not of `lrnn eval` or `lrnn position`")
    version = results.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema_version {version}, and this program reads {SCHEMA_VERSION}; update lrnn")
    return results


def describe_environment(device: str) -> dict[str, str]:
    """Return what results were computed with on a device, such as "cpu" or "cuda:1"."""
    return environment.describe_environment(torch.device(device), PACKAGES)
