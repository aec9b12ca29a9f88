"""The parts that result folders share: the version of results.json, and the rule on which folders may be replaced."""

from pathlib import Path

import torch

from lrnn import environment
from lrnn.errors import UserError

SCHEMA_VERSION = 1
PACKAGES = ("lm-eval", "transformers", "datasets", "tokenizers", "numpy")  # their versions are recorded too


def check_output(out: Path) -> None:
    """Raise UserError unless `out` is absent, empty, or holds earlier results, which are replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; it must be a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "results.json").is_file():
        raise UserError(f"--out {out} holds other files and no results.json; choose a new or empty folder")


def describe_environment(device: str) -> dict[str, str]:
    """Return what results were computed with on a device, such as "cpu" or "cuda:1"."""
    return environment.describe_environment(torch.device(device), PACKAGES)
