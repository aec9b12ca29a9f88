"""Run the commands of a batch script in a container, with Apptainer or with Pyxis, SLURM's plugin for enroot."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lrnn.errors import UserError

HELP = (
    "run in a container: IMAGE.sif and docker://IMAGE with Apptainer, others (IMAGE.sqsh, REGISTRY#IMAGE:TAG) with "
    "Pyxis; folders of the run and caches are mounted"
)
APPTAINER_SCHEMES = ("docker://", "oras://", "library://")
# Folders of caches and data that commands share with those outside of a container, if they exist or are set.
CACHES = {"TRITON_CACHE_DIR": "~/.triton", "HF_HOME": "~/.cache/huggingface", "TMPDIR": "/tmp"}


def add_argument(parser: argparse._ActionsContainer) -> None:
    """Add the option `--container`."""
    parser.add_argument("--container", metavar="IMAGE", help=HELP)


def words(image: str | None, paths: Iterable[Path]) -> list[str]:
    """Return the words between `srun` and the command that it runs. They are none without an image.

    Args:
        image: the value of `--container`.
        paths: files and folders that the command needs besides the current folder and the caches.

    Raises:
        UserError: an image file does not exist, or a path cannot be mounted.
    """
    if image is None:
        return []
    here = Path.cwd()
    mounts = _mounts([here, *paths, *_caches()])
    for_apptainer = image.endswith(".sif") or image.startswith(APPTAINER_SCHEMES)
    if (image.endswith((".sif", ".sqsh")) or image.startswith(("/", "."))) and not Path(image).exists():
        raise UserError(f"--container {image} is not a file; docker/ builds images of lrnn")
    if Path(image).exists():
        image = str(Path(image).resolve())
    if for_apptainer:
        binds = [word for mount in mounts for word in ("--bind", str(mount))]
        return ["apptainer", "exec", "--nv", *binds, "--pwd", str(here), image]
    listed = ",".join(f"{mount}:{mount}" for mount in mounts)
    return [f"--container-image={image}", f"--container-mounts={listed}", f"--container-workdir={here}"]


def paths_in(values: Any) -> Iterator[Path]:
    """Yield the texts of nested settings that are absolute paths, or paths from here, of what exists."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from paths_in(value)
    elif isinstance(values, str) and "/" in values and len(values) < 4096 and Path(values).exists():
        yield Path(values)


def _caches() -> list[Path]:
    folders = (Path(os.environ.get(name, default)).expanduser() for name, default in CACHES.items())
    return [folder for folder in folders if folder.is_dir()]


def _mounts(paths: Iterable[Path]) -> list[Path]:
    """Return folders that hold all paths: absolute, without links, and none within another."""
    folders = sorted({p if p.is_dir() else p.parent for p in (path.absolute() for path in paths)})
    # A link is followed outside; inside, both its own path and that which it names are wanted.
    folders = sorted({*folders, *(folder.resolve() for folder in folders)})
    kept: list[Path] = []
    for folder in folders:
        if any(character in str(folder) for character in ",:"):
            raise UserError(f"{folder} cannot be mounted into a container: its name has a comma or a colon")
        if not any(folder.is_relative_to(other) for other in kept):
            kept.append(folder)
    return kept
