"""Write the documents of all packages as JSON lines: without duplicates, whole subtrees held out, mixed."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lrnn.ladder.text.extract import Entry, read_index
from lrnn.ladder.text.table import DOMAINS

CHUNKS = 64  # train-*.jsonl of a domain; the files of one number hold the same share of every domain
LEAST_BYTES = 100_000  # of a train-*.jsonl; a domain with less text has fewer files
LARGEST = 0.5  # share of what is held out of a package that one subtree may be
LONG_LINE = 50  # characters; shorter lines are alike by chance
MOST_KNOWN = 0.5  # share of a held-out document's bytes in long lines that may be in the train documents as well


class Placed(NamedTuple):
    """A document, with the name of its package."""

    package: str
    entry: Entry


def without_duplicates(documents: Iterable[Placed]) -> tuple[list[Placed], dict[str, int]]:
    """Return the documents without those whose text came before, and how many of each package those were."""
    seen: set[str] = set()
    kept: list[Placed] = []
    repeated: dict[str, int] = defaultdict(int)
    for document in documents:
        if document.entry.digest in seen:
            repeated[document.package] += 1
        else:
            seen.add(document.entry.digest)
            kept.append(document)
    return kept, dict(repeated)


def held_out_subtrees(documents: Iterable[Placed], shares: dict[str, float]) -> set[tuple[str, str]]:
    """Return the (domain, subtree) that are held out.

    Of each package and domain, subtrees are taken in the order of a hash of their names. One that has more than half of
    the text that is to be held out, or more than is left of it, is not taken.
    """
    sizes: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for package, entry in documents:
        sizes[package, entry.domain][entry.subtree] += entry.size
    chosen = set()
    for (_, domain), subtrees in sizes.items():
        room = shares[domain] * sum(subtrees.values())
        largest = room * LARGEST
        for subtree in sorted(subtrees, key=_order):
            if subtrees[subtree] <= min(room, largest):
                room -= subtrees[subtree]
                chosen.add((domain, subtree))
    return chosen


def assemble(
    names: list[str], shares: dict[str, float], source: Path, out: Path, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Write `DOMAIN/train-*.jsonl` and `DOMAIN/heldout.jsonl` into `out`, which must be empty.

    A line has `text`, `package` and `path`. Subtrees follow each other in the order of a hash, so that every run of
    files is a sample of all packages. Held-out documents that mostly consist of lines of train documents are dropped.

    Args:
        names: packages in order, whose documents are in the folder `source`; see `extract`.
        shares: share of each package's text to hold out, by domain.

    Returns:
        By package: `left_out`, the number of documents that were `repeated` and of held-out documents `known` from the
        train text, and `text`: `documents` and `bytes` by domain and split.
    """
    documents, repeated = without_duplicates(Placed(name, e) for name in names for e in read_index(name, source))
    held = held_out_subtrees(documents, shares)
    found = {name: {"left_out": {"repeated": repeated.get(name, 0), "known": 0}, "text": {}} for name in names}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(source / f"{name}.jsonl", "rb")) for name in names}
        for domain in DOMAINS:
            mine = sorted((d for d in documents if d.entry.domain == domain), key=lambda d: _order(d.entry.subtree))
            if not mine:
                continue
            (out / domain).mkdir()
            heldout = [d for d in mine if (domain, d.entry.subtree) in held]
            train = [d for d in mine if (domain, d.entry.subtree) not in held]
            say(f"{domain}: {len(train):,} documents, {len(heldout):,} held out, {_megabytes(mine):,.1f} MB")
            for document in train:
                _count(found, document, "train")
            lines = [_long_lines(_text(row)) for row in _rows(heldout, files)]
            wanted = set[str]().union(*lines)
            common: set[str] = set()
            for row in _write_train(train, files, out / domain):
                common |= wanted & _long_lines(_text(row))
            with open(out / domain / "heldout.jsonl", "wb") as file:
                for document, row, own in zip(heldout, _rows(heldout, files), lines, strict=True):
                    if own and sum(map(len, own & common)) > MOST_KNOWN * sum(map(len, own)):
                        found[document.package]["left_out"]["known"] += 1
                    else:
                        file.write(row)
                        _count(found, document, "heldout")
    return found


def _count(found: dict[str, dict[str, Any]], document: Placed, split: str) -> None:
    entry = found[document.package]["text"].setdefault(document.entry.domain, {})
    counts = entry.setdefault(split, {"documents": 0, "bytes": 0})
    counts["documents"] += 1
    counts["bytes"] += document.entry.size


def _order(subtree: str) -> bytes:
    return hashlib.sha256(subtree.encode()).digest()


def _rows(documents: Iterable[Placed], files: Mapping[str, BinaryIO]) -> Iterator[bytes]:
    for package, entry in documents:
        files[package].seek(entry.offset)
        yield files[package].read(entry.length)


def _text(row: bytes) -> str:
    return json.loads(row)["text"]


def _long_lines(text: str) -> set[str]:
    return {stripped for line in text.split("\n") if len(stripped := line.strip()) >= LONG_LINE}


def _write_train(documents: list[Placed], files: Mapping[str, BinaryIO], folder: Path) -> Iterator[bytes]:
    """Write files of about equal size, and yield every line after it was written."""
    total = sum(d.entry.length for d in documents)
    count = min(CHUNKS, max(1, total // LEAST_BYTES))
    rows = zip(documents, _rows(documents, files), strict=True)
    done = 0
    for number in range(count):
        with open(folder / f"train-{number:04d}.jsonl", "wb") as file:
            while done < total * (number + 1) / count:
                document, row = next(rows)
                file.write(row)
                done += document.entry.length
                yield row


def _megabytes(documents: list[Placed]) -> float:
    return sum(d.entry.size for d in documents) / 1e6
