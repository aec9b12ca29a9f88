"""Commands of lrnn as child processes, and the copy of a ladder that they read."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from lrnn import paths
from lrnn.files import write_atomically
from lrnn.pretrain.launch import LAUNCHER
from lrnn.settings import Section


def start(arguments: list[str], log: Path | None = None, **variables: str) -> subprocess.Popen:
    """Start a command line of lrnn. It ends when this process dies in any way.

    It leads a session of its own, so that Ctrl-C at the terminal reaches this process alone, which passes it on.

    Args:
        arguments: words after `lrnn`.
        log: file that the output is appended to; None for that of this process.
        variables: added to the environment.
    """
    command = [sys.executable, "-m", "lrnn.cli", *arguments]
    environment = {**os.environ, **variables, LAUNCHER: str(os.getpid())}
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    if log is None:
        return subprocess.Popen(command, **options)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, **options)


def write_settings(config: Section, file: Path) -> None:
    """Write settings as YAML that means the same from every folder: with absolute paths."""
    values = config.model_dump()
    paths.place(type(config), values, Path.cwd(), lambda key: str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
