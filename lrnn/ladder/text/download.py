"""Fetch packages from Debian and PyPI with their own clients, without installing them."""

import subprocess
from pathlib import Path

from lrnn.errors import UserError
from lrnn.files import sha256
from lrnn.ladder.text.table import Package


def fetch(name: str, package: Package, folder: Path, newest: bool) -> Path:
    """Return the file of a package in `folder`, downloaded unless it is there.

    Args:
        newest: whether to take the version that the registry offers now, whose checksum only the registry's client
            checks, if the table's version is not in the folder.

    Raises:
        UserError: the file has another checksum than the table says, or the registry does not have the version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = _find(name, package.version, folder)
    if found is None and newest:
        before = set(folder.iterdir())
        _run(name, None, package.source, folder)
        new = set(folder.iterdir()) - before
        known = [path for pattern in (f"{name}_*.deb", f"{name}-[0-9]*") for path in folder.glob(pattern)]
        return new.pop() if new else max(known, key=lambda path: path.stat().st_mtime)
    if found is None:
        _run(name, package.version, package.source, folder)
        found = _find(name, package.version, folder)
        assert found is not None
    if (digest := sha256(found)) != package.sha256:
        raise UserError(
            f"{found} has the SHA-256 {digest}, and the table says {package.sha256}; remove the file to fetch it again"
        )
    return found


def version_of(file: Path) -> str:
    """Return the version in the name of a package's file."""
    if file.suffix == ".deb":
        return file.name.split("_")[1].replace("%3a", ":")
    return file.name.removesuffix(".tar.gz").removesuffix(".whl").split("-")[1]


def _find(name: str, version: str, folder: Path) -> Path | None:
    names = (f"{name}_{version.replace(':', '%3a')}_*.deb", f"{name}-{version}.tar.gz", f"{name}-{version}-*.whl")
    return next((file for pattern in names for file in folder.glob(pattern)), None)


def _run(name: str, version: str | None, source: str, folder: Path) -> None:
    if source == "debian":
        command = ["apt-get", "download", "-q", name if version is None else f"{name}={version}"]
        hint = f"`apt-cache policy {name}` lists versions after `apt-get update`"
    else:
        wanted = name if version is None else f"{name}=={version}"
        command = ["python3", "-m", "pip", "download", "-q", "--no-deps", "--dest", ".", wanted]
        hint = f"`pip index versions {name}` lists versions"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is needed to fetch {name}; copy the package's file to {folder} instead"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "ERROR"))]
        raise UserError(
            f"{' '.join(command)} failed: {' '.join(lines) or done.stderr.strip()}; {hint}; --newest takes the newest"
        )
