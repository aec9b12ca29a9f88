"""Read the files inside packages as streams, so that nothing is unpacked to disk."""

import gzip
import io
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from lrnn.errors import UserError


class Member(NamedTuple):
    """A file in a package: its path, its size (of a compressed file, compressed) and a function that reads it once."""

    path: str
    size: int
    read: Callable[[], bytes]


def members(file: Path, archive: str | None, root: str) -> Iterator[Member]:
    """Yield the regular files of a package, in its order. Each can be read only until the next is taken.

    Files compressed with gzip are decompressed, and their paths lack the suffix (`.gz`, `.dz`).

    Args:
        file: a .deb, a .tar.gz or a .whl.
        archive: glob of the archives inside it that hold the files; None if the package itself does.
        root: regular expression; the beginning of a path that it matches is removed.
    """
    for member in _outer(file):
        if archive is None:
            yield _plain(member, root)
        elif fnmatchcase(member.path, archive):
            for inner in _inner(member):
                yield _plain(inner, root)


def _plain(member: Member, root: str) -> Member:
    path = re.sub(f"^(?:{root})", "", member.path) if root else member.path
    if path.endswith((".gz", ".dz")):
        return Member(path[:-3], member.size, lambda: gzip.decompress(member.read()))
    return member._replace(path=path)


def _outer(file: Path) -> Iterator[Member]:
    if file.suffix == ".whl":
        yield from _of_zip(zipfile.ZipFile(file))
    elif file.suffix == ".deb":
        with _tar_of_deb(file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield from _of_tar(tar)
    else:
        with tarfile.open(file, "r|*") as tar:
            yield from _of_tar(tar)


def _inner(member: Member) -> Iterator[Member]:
    if member.path.endswith(".zip"):
        yield from _of_zip(zipfile.ZipFile(io.BytesIO(member.read())))
    else:
        with tarfile.open(fileobj=io.BytesIO(member.read()), mode="r|*") as tar:
            yield from _of_tar(tar)


@contextmanager
def _tar_of_deb(file: Path) -> Iterator[IO[bytes]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(file)]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise UserError(f"dpkg-deb is needed to read {file}; it is part of Debian's package dpkg") from None
    assert process.stdout is not None and process.stderr is not None
    try:
        yield process.stdout
        process.stdout.read()  # what follows the end of the archive
        if process.wait():
            raise tarfile.ReadError("dpkg-deb failed")
    except (tarfile.TarError, EOFError) as error:
        reason = process.stderr.read().decode().strip() or error
        raise UserError(f"{file} cannot be read: {reason}") from error
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _of_tar(tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if info.isfile():
            content = tar.extractfile(info)
            assert content is not None
            yield Member(info.name.removeprefix("./"), info.size, content.read)


def _of_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    with archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield Member(info.filename, info.file_size, partial(archive.read, info))
