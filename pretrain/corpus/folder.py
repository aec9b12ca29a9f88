"""A folder as a source of text: every matching file is a document."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from lrnn.errors import UserError
from lrnn.pretrain.corpus.source import Document, num_parts, take_train


@dataclass
class FolderPart:
    """Files of a folder."""

    root: Path
    files: list[str]
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        for name in self.files:
            data = (self.root / name).read_bytes()
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{self.root / name}: changed while the corpus was built, no longer UTF-8") from error
            yield Document(text, name, hashlib.sha256(os.fsencode(name)).digest())


def list_files(root: Path, include: list[str], exclude: list[str]) -> list[str]:
    """Return the files below `root` that match a glob of `include` and none of `exclude`, as sorted relative paths.

    A glob may match the whole relative path or the file's name; `*` also matches `/`. Symbolic links to folders are not
    followed; sockets, pipes and devices are left out.
    """

    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch(name, g) or fnmatch(os.path.basename(name), g) for g in globs)

    def fail(error: OSError) -> None:
        raise UserError(f"folder {error.filename}: cannot be listed ({error.strerror})") from error

    found = []
    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            usable = os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))
            if usable and matches(relative, include) and not matches(relative, exclude):
                found.append(relative)
    return sorted(found)


class FileCheck(NamedTuple):
    """The result of the first pass over a file."""

    size: int  # bytes
    mtime_ns: int  # time of the last change
    reason: str  # why the file cannot be used; "" if it can
    detail: str


def check_file(path: Path) -> FileCheck:
    """Read a file once, to find out whether it is text before any work is done."""
    try:
        mtime_ns = path.stat().st_mtime_ns
        data = path.read_bytes()
    except OSError as error:
        return FileCheck(0, 0, "unreadable", error.strerror or str(error))
    if not data:
        return FileCheck(0, mtime_ns, "zero-length", "")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return FileCheck(len(data), mtime_ns, "not UTF-8", f"byte 0x{data[error.start]:02x} at offset {error.start}")
    return FileCheck(len(data), mtime_ns, "", "")


class FolderSource:
    """A folder, of which every matching file is a document.

    Args:
        root: the folder.
        include, exclude: globs, see `list_files`.
        skip_bad_files: leave out files that are empty, unreadable or not UTF-8, instead of raising.
        map_files: `map`, or that of a process pool, for the pass over all files.

    Raises:
        UserError: the folder is missing, a file is bad, or no file is left.
    """

    def __init__(self, root: Path, include: list[str], exclude: list[str], skip_bad_files: bool = False, map_files=map):
        if not root.is_dir():
            raise UserError(f"folder {root}: there is no such folder")
        names = list_files(root, include, exclude)
        checks = list(map_files(check_file, [root / name for name in names]))
        bad = [(name, check) for name, check in zip(names, checks, strict=True) if check.reason]
        if bad and not skip_bad_files:
            first = "; ".join(f"{n}: {c.reason}" + (f", {c.detail}" if c.detail else "") for n, c in bad[:3])
            raise UserError(
                f"folder {root}: {len(bad)} of {len(names)} files cannot be used "
                f"({first}{'; ...' if len(bad) > 3 else ''}). "
                "Fix or exclude them, or leave them out with --skip-bad-files"
            )
        good = [(name, check) for name, check in zip(names, checks, strict=True) if not check.reason]
        if not good:
            left_out = f", {len(bad)} bad ones left out" if bad else ""
            raise UserError(f"empty corpus: no file of folder {root} matches {include} without {exclude}{left_out}")
        self.root = root
        self.files = [name for name, _ in good]
        self.sizes = [check.size for _, check in good]
        self.skipped = Counter(check.reason for _, check in bad)
        self.fingerprint = hashlib.sha256(
            b"".join(b"%s\0%d\0%d\n" % (os.fsencode(n), c.size, c.mtime_ns) for n, c in good)
        ).hexdigest()
        self.num_parts: int | None = num_parts(sum(self.sizes), len(self.files))

    def parts(self) -> Iterator[FolderPart]:
        """Yield runs of files of about equal size."""
        assert self.num_parts is not None
        share = sum(self.sizes) / self.num_parts
        groups: list[list[str]] = [[] for _ in range(self.num_parts)]
        sizes = [0] * self.num_parts
        before = 0
        for name, size in zip(self.files, self.sizes, strict=True):
            part = min(int((before + size / 2) / share), self.num_parts - 1)  # The middle of a file decides.
            groups[part].append(name)
            sizes[part] += size
            before += size
        for group, size in zip(groups, sizes, strict=True):
            yield FolderPart(self.root, group, size)

    def sample(self, max_bytes: int, heldout: float) -> Iterator[str]:
        """Yield texts of train files in the order of their hashes, until `max_bytes` are reached."""
        order = sorted(self.files, key=lambda name: hashlib.sha256(b"sample " + os.fsencode(name)).digest())
        yield from take_train(FolderPart(self.root, order, sum(self.sizes)).documents(), max_bytes, heldout)
