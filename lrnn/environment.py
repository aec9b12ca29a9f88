"""What a result was computed with: software, device, the commit and a checksum of the code."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch
import triton

PACKAGE = Path(__file__).parent  # not resolved: the folder in which the rooms are links


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, the device's name, the checksum of the code and, where that lies in a git repository which tracks it,
    the commit, with `-dirty` where files differ from it."""
    facts = {"device": "cpu", "torch": torch.__version__, "triton": triton.__version__, "source": source_checksum()}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    if commit := _commit():
        facts["commit"] = commit
    return facts


@functools.cache
def source_checksum(package: Path = PACKAGE) -> str:
    """The first 12 hex digits of a SHA-256 over the .py files of a package, in the order of their paths.

    It says which code it was also where there is no commit, or one that files differ from, and is the same for a
    checkout, a copy of it without history, and an installed package. In a checkout this prints it:

        python -c "from lrnn.environment import source_checksum as f; print(f())"
    """
    # The rooms are links in a checkout, which Path.rglob does not follow.
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
    # A package installed into somebody's repository lies there untracked, and that repository's commit says nothing.
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
