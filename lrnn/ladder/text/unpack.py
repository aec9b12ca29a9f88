"""Unpack parts into corpora: `python -m lrnn.ladder.text.unpack --help`."""

import argparse
import json
import lzma
import multiprocessing
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.files import new_folder, write_json
from lrnn.ladder.text.chunks import HELDOUT, Documents, encoded
from lrnn.ladder.text.pack import FORMAT
from lrnn.pretrain.corpus.finish import describe, finish_split
from lrnn.pretrain.corpus.shard_writer import ShardWriter, watch_parent
from lrnn.tokenizer import load_tokenizer

HELDOUT_SHARDS = 4  # of a domain: as many processes tokenise its held-out text
BATCH_TOKENS = 1 << 20  # of a record batch in a shard


def unpack(parts: list[Path], out: Path, processes: int) -> dict[str, dict[str, int]]:
    """Write a corpus for each domain, with the splits `train` and `heldout`, and its `heldout.jsonl`, into `out`.

    Args:
        parts: parts of one pack, from the first on without a gap.
        out: a new folder.
        processes: how many work at once.

    Returns:
        By domain: the tokens of its splits.

    Raises:
        UserError: parts are missing, damaged, or of different packs, or `out` exists.
    """
    abouts = sorted(((_about(part), part) for part in parts), key=lambda pair: pair[0]["part"])
    if not abouts or [about["part"] for about, _ in abouts] != list(range(len(abouts))):
        raise UserError(f"parts {[about['part'] for about, _ in abouts]} should be 0, 1, 2, ... without a gap")
    chunks = [number for about, _ in abouts for number in about["chunks"]]
    if chunks != list(range(len(chunks))):
        raise UserError(f"the parts hold chunks {chunks}, which should be 0, 1, 2, ...; take all from one run of pack")
    if len({about["pack"] for about, _ in abouts}) > 1:
        raise UserError(f"{', '.join(str(part) for part in parts)} are parts of different packs")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists; remove it, or choose another folder")
    with new_folder(out) as new:
        jobs = list(_jobs([part for _, part in abouts], new))
        if processes == 1:
            entries = [_write_shard(*job) for job in jobs]
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
                entries = list(pool.map(_write_shard, *zip(*jobs, strict=True)))
        written = [(path, entry) for (path, *_), entry in zip(jobs, entries, strict=True)]
        arguments = {"pack": abouts[0][0]["pack"], "parts": len(abouts)}
        folders = sorted({path.parents[1] for path, _ in written})
        return {folder.name: _finish(folder, written, arguments) for folder in folders}


def _jobs(parts: list[Path], new: Path) -> Iterator[tuple[Path, Path, str, int, int]]:
    """Write the tokenizer and the held-out text of parts, and yield the arguments of `_write_shard` for all shards."""
    shards: Counter[str] = Counter()  # of the split `train`; not every chunk has a file of every domain
    for part in parts:
        with tarfile.open(part) as tar:
            members = tar.getnames()
        for member in members:
            domain, _, number = member.removesuffix(".xz").rpartition("-")
            if member.startswith("tokenizer/"):
                (new / "tokenizer").mkdir(exist_ok=True)
                (new / member).write_bytes(_member(part, member))
            elif number == f"{HELDOUT}.jsonl":
                text = new / domain / f"{HELDOUT}.jsonl"
                (new / domain / HELDOUT).mkdir(parents=True)
                text.write_bytes(content := _decompressed(_member(part, member), part))
                count = min(HELDOUT_SHARDS, content.count(b"\n"))
                for i in range(count):
                    yield new / domain / HELDOUT / f"part-{i:05d}.arrow", text, "", i, count
            elif number.isdigit():
                (new / domain / "train").mkdir(parents=True, exist_ok=True)
                yield new / domain / "train" / f"part-{shards[domain]:05d}.arrow", part, member, 0, 1
                shards[domain] += 1


def _finish(folder: Path, written: list[tuple[Path, dict]], arguments: dict[str, Any]) -> dict[str, int]:
    """Make the shards of a domain a corpus. Return the tokens of its splits."""
    load_tokenizer(folder.parent / "tokenizer").save(folder / "tokenizer")
    splits = {}
    for split in ("train", HELDOUT):
        entries = [{"splits": {split: entry}} for path, entry in written if path.parent == folder / split]
        splits[split] = finish_split(folder, split, "uint16", entries)
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_json(folder / "manifest.json", describe(tokenizer, splits, {}, arguments))
    return {split: entry["tokens"] for split, entry in splits.items()}


def _write_shard(path: Path, source: Path, member: str, index: int, of: int) -> dict[str, Any]:
    """Write a shard: a chunk of a part, or without `member` slice `index` of `of` of held-out text, which is tokenised.

    Returns:
        Its entry in the manifest, with the bytes of its text.
    """
    if member:
        documents = Documents.of(_decompressed(_member(source, member), source))
    else:
        lines = source.read_bytes().splitlines()
        rows = map(json.loads, lines[len(lines) * index // of : len(lines) * (index + 1) // of])
        documents, _ = encoded(rows, source.parents[1] / "tokenizer")
    writer = ShardWriter(path, "uint16")
    ends = np.cumsum(documents.lengths, dtype=np.int64)
    start = first = 0
    while first < len(ends):
        stop = max(first + 1, int(np.searchsorted(ends, start + BATCH_TOKENS)))
        end = int(ends[stop - 1])
        writer.write_flat(documents.tokens[start:end], documents.lengths[first:stop])
        start, first = end, stop
    return {**writer.close(), "bytes": documents.num_bytes}


def _about(part: Path) -> dict[str, Any]:
    try:
        about = json.loads(_member(part, "part.json"))
    except KeyError:
        raise UserError(f"{part} is not a part: it has no part.json") from None
    if about["format"] != FORMAT:
        raise UserError(f"{part} has format {about['format']}, this program reads {FORMAT}; pack again")
    return about


def _member(part: Path, name: str) -> bytes:
    try:
        with tarfile.open(part) as tar:
            file = tar.extractfile(name)
            assert file is not None
            return file.read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{part} cannot be read ({error}); copy it again") from error


def _decompressed(content: bytes, part: Path) -> bytes:
    try:
        return lzma.decompress(content)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{part} is damaged ({error}); copy it again") from error


def main() -> int:
    """Unpack parts into corpora."""
    parser = argparse.ArgumentParser("python -m lrnn.ladder.text.unpack", description="Unpack parts into corpora.")
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART", help="part-00.tar and those that follow")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the corpora")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        for domain, tokens in unpack(args.parts, args.out, args.processes).items():
            print(
                f"{args.out / domain}: " + ", ".join(f"{n / 1e6:.1f} million tokens in {s}" for s, n in tokens.items())
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"took {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
