"""What a result was computed with: software, device and the commit of the code."""

import functools
import subprocess
from pathlib import Path

import torch
import triton


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, the device's name and, where the code lies in a git repository that tracks it, the commit, with
    `-dirty` where files differ from it."""
    facts = {"device": "cpu", "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    if commit := _commit():
        facts["commit"] = commit
    return facts


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
