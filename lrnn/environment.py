"""Describe what a result was computed with: software, device, the commit and a checksum of the code."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import triton

import lrnn

PACKAGE = Path(__file__).parent  # not resolved: the folder in which the rooms are links


def describe_environment(device: torch.device, packages: Sequence[str] = ()) -> dict[str, str]:
    """Return the device's name, the versions of Python, lrnn, torch and triton, and the checksum of the code.

    The commit is added if the code is tracked by a git repository, with `-dirty` if files differ from it.

    Args:
        device: the device that computed the result.
        packages: distributions whose versions are added.
    """
    facts = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    facts |= {"python": platform.python_version(), "lrnn": lrnn.__version__}
    facts |= {"torch": torch.__version__, "triton": triton.__version__}
    facts |= {name: version(name) for name in packages}
    facts["source"] = source_checksum()
    if commit := _commit():
        facts["commit"] = commit
    return facts


@functools.cache
def source_checksum(package: Path = PACKAGE) -> str:
    """Return the first 12 hex digits of a SHA-256 over the .py files of a package, in the order of their paths.

    It identifies the code even if there is no commit or files differ from the commit. It is the same for a checkout,
    a copy of it without history, and an installed package. In a checkout this prints it:

        python -c "from lrnn.environment import source_checksum as f; print(f())"
    """
    # In a checkout the rooms are links, which Path.rglob does not follow.
    folders = os.walk(package, followlinks=True)
    files = [Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")]
    by_path = {file.relative_to(package).as_posix(): file for file in files}
    checksum = hashlib.sha256()
    for path in sorted(by_path):
        content = by_path[path].read_bytes()
        checksum.update(f"{path}\0{len(content)}\0".encode() + content)
    return checksum.hexdigest()[:12]


@functools.cache
def _commit() -> str | None:
    here = Path(__file__).resolve()
    # The commit of a repository into which lrnn was merely installed (untracked) says nothing about lrnn.
    commands = (
        ["git", "ls-files", "--error-unmatch", here.name],
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
    )
    try:
        runs = [
            subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
            for command in commands
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return runs[-1].stdout.strip()
