"""Read the batch scripts that `lrnn submit` and `lrnn ladder --submit` fill in."""

import shlex
from pathlib import Path


def directives(script: Path) -> dict[str, str]:
    """Return the options of the #SBATCH lines of a script."""
    found = [shlex.split(line)[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH --")]
    return dict(option.removeprefix("--").partition("=")[::2] for option in found)


def arguments(script: Path) -> list[str]:
    """Return the arguments that a script sets for itself."""
    return shlex.split(next(line for line in script.read_text().splitlines() if line.startswith("set -- ")))[2:]
