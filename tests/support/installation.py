"""Build lrnn's sdist and wheel from a copy of the repository, and run programs with an installed one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
FOLDERS = ("configs", "docker", "docs", "eval", "kernels", "lrnn", "pretrain", "slurm")


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def copy_repository(to: Path) -> None:
    """Copy what an sdist is made from, without caches."""
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in REPOSITORY.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copyfile(file, to / file.name)


def build(what: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel in `source`, and return it."""
    done = run(sys.executable, "-c", BUILD, f"build_{what}", out, cwd=source)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = out.glob("*.tar.gz" if what == "sdist" else "*.whl")
    return built


def install(wheel: Path, target: Path) -> None:
    """Install a wheel into a folder, without what it depends on."""
    options = ["--quiet", "--no-deps", "--no-compile", "--no-index", "--disable-pip-version-check", "--target"]
    done = run(sys.executable, "-m", "pip", "install", *options, target, wheel, cwd=target)
    assert done.returncode == 0, done.stderr
