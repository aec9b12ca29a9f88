"""Read the documents of one package into a file of JSON lines, with an index beside it."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.ladder.text.archives import Member, members
from lrnn.ladder.text.contamination import Benchmarks
from lrnn.ladder.text.readers import documents_of
from lrnn.ladder.text.table import Files, Package

FORMAT = 1  # change it when the same settings give other documents
LEAST_CHARACTERS = 200
LONGEST_LINE = 20_000  # characters; a file with a longer line was written by a program
MOST_DIGITS = 0.3  # of the characters that are not white space; above are tables of numbers
RAW_FACTOR = 15  # a page of HTML is at most so many times as long as its text


class Entry(NamedTuple):
    """A line of the index: where a document is in the file of its package, and what decides about it.

    Attributes:
        offset, length: bytes of its line.
        size: bytes of its text.
        domain: one of `DOMAINS`.
        subtree: name of its subtree, which begins with that of the package.
        digest: hash of its text with white space collapsed, in hex.
    """

    offset: int
    length: int
    size: int
    domain: str
    subtree: str
    digest: str


def key_of(package: Package, file_sha256: str, benchmarks: str) -> str:
    """Return a hash of all that decides which documents a package gives."""
    given = [FORMAT, package.model_dump(exclude={"licence", "version", "sha256"}), file_sha256, benchmarks]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def is_extracted(name: str, key: str, folder: Path) -> bool:
    """Return whether the documents of a package are in `folder` as `key` says."""
    done = folder / f"{name}.json"
    return done.is_file() and json.loads(done.read_text())["key"] == key


def extract(name: str, package: Package, file: Path, key: str, benchmarks: Path, folder: Path) -> dict[str, Any]:
    """Write `NAME.jsonl`, `NAME.index` and at last `NAME.json` with the counts of a package. Return the counts.

    Raises:
        UserError: the package cannot be read, or has no document.
    """
    shared = _benchmarks_of(benchmarks).share_words
    left_out: Counter[str] = Counter()
    count = offset = 0
    with open(folder / f"{name}.jsonl", "wb") as documents, open(folder / f"{name}.index", "w") as index:
        for path, files, text in _documents(file, package, left_out):
            if reason := _unfit(text, files, shared):
                left_out[reason] += 1
                continue
            subtree = f"{name}/{_subtree(path, files)}"
            row = {"text": text, "package": name, "path": path}
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).hexdigest()
            entry = Entry(offset, len(line), len(text.encode()), files.domain, subtree, digest)
            documents.write(line)
            index.write(json.dumps(entry) + "\n")
            offset += len(line)
            count += 1
    if count == 0:
        raise UserError(f"package {name} ({file}) gives no document; left out: {dict(left_out)}")
    counts = {"key": key, "documents": count, "left_out": dict(left_out)}
    write_json(folder / f"{name}.json", counts)
    return counts


def read_index(name: str, folder: Path) -> list[Entry]:
    """Return the index of a package's documents."""
    with open(folder / f"{name}.index") as lines:
        return [Entry(*json.loads(line)) for line in lines]


_benchmarks_of = cache(Benchmarks)  # read once per process


def _documents(file: Path, package: Package, left_out: Counter[str]) -> Iterator[tuple[str, Files, str]]:
    for member in members(file, package.archive, package.root):
        files = next((entry for entry in package.files if _takes(entry, member.path)), None)
        if files is None:
            continue
        if _is_too_large(member, files):
            left_out["too long"] += 1
            continue
        try:
            for path, text in documents_of(member.path, member.read(), files):
                yield path, files, text
        except UnicodeDecodeError:
            left_out[f"not {files.encoding}"] += 1


def _takes(files: Files, path: str) -> bool:
    def matches(globs: list[str]) -> bool:
        return any(fnmatchcase(path, glob) for glob in globs)

    return matches(files.include) and not matches(files.exclude)


def _is_too_large(member: Member, files: Files) -> bool:
    most = files.most_kb * 1000
    return (files.read == "plain" and member.size > most) or (files.read == "html" and member.size > RAW_FACTOR * most)


def _unfit(text: str, files: Files, shared: Callable[[str], bool]) -> str | None:
    """Return why a document is left out, or None."""
    if len(text) > files.most_kb * 1000:
        return "too long"
    if len(text) < LEAST_CHARACTERS:
        return "too short"
    if max(map(len, text.split("\n"))) > LONGEST_LINE:
        return "long lines"
    written = sum(map(len, text.split()))
    if len(re.findall(r"[0-9]", text)) > MOST_DIGITS * written:
        return "numbers"
    return "benchmarks" if shared(text) else None


def _subtree(path: str, files: Files) -> str:
    match = re.match(files.subtree, path)
    return match.group() if match else path
