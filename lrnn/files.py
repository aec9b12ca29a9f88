"""Write files and folders whole or not at all, compute their checksums, and expand paths."""

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrnn.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS has in place of large files
NOT_FETCHED = "a pointer of Git LFS in place of the file; fetch it with `git lfs pull`"
VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def expand(text: str, origin: str) -> str:
    """Replace `~` and `$VARIABLES` in a path. Raise UserError, which begins with `origin`, if that is not possible."""
    for plain, braced in VARIABLE.findall(text):
        if (plain or braced) not in os.environ:
            raise UserError(f"{origin} = {text!r}: the environment variable {plain or braced} is not set")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"{origin} = {text!r}: there is no user {expanded.split('/')[0][1:]!r}; write ./~... for a name"
        )
    return os.path.expandvars(expanded)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that readers see the old or the new content, never a part. Text is written as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def use_default_mode(file: Path) -> None:
    """Give a file the permissions that a new file gets in its folder, from the umask or the folder's default ACL.

    safetensors and `tempfile` write files that only their owner can read.
    """
    probe = file.with_name(f".{file.name}.mode")
    probe.touch()
    try:
        file.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def copy_files(source: Path, folder: Path) -> None:
    """Copy the files of a folder into a new one. The copies get the permissions of new files, not the source's."""
    folder.mkdir()
    for file in filter(Path.is_file, sorted(source.iterdir())):
        shutil.copyfile(file, folder / file.name)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Fill a hidden folder beside `out` that takes its name when the block succeeds, and is deleted otherwise.

    `out` must be absent or an empty folder.

    Raises:
        UserError: the folder beside `out` cannot be made.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}: {error.filename})") from None
    try:
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replace_folder(out: Path) -> Iterator[Path]:
    """Fill a hidden folder beside `out` that takes its name, and its place, when the block succeeds.

    If the block fails, the hidden folder is deleted and an existing `out` stays as it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # In a container, a process has the number of one that was killed.
    new, old = (out.with_name(f".{out.name}.{kind}.{token}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
