"""Unpack parts into corpora: `python -m lrnn.ladder.text.unpack --help`."""

import argparse
import json
import lzma
import multiprocessing
import os
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lrnn.errors import UserError
from lrnn.files import new_folder, write_json
from lrnn.ladder.text.chunks import HELDOUT, Documents
from lrnn.ladder.text.pack import FORMAT
from lrnn.pretrain.corpus.finish import describe, finish_split
from lrnn.pretrain.corpus.shard_writer import ShardWriter, watch_parent
from lrnn.tokenizer import load_tokenizer

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
        tasks: dict[str, list[tuple[Path, str]]] = {}
        for _, part in abouts:
            with tarfile.open(part) as tar:
                for member in tar.getnames():
                    if member.startswith("tokenizer/") or member.endswith(".jsonl.xz"):
                        target = new / (member.removesuffix(".xz") if member.endswith(".xz") else member)
                        target.parent.mkdir(exist_ok=True)
                        content = _member(part, member)
                        target.write_bytes(_decompressed(content, part) if member.endswith(".xz") else content)
                    elif member.endswith(".xz"):
                        tasks.setdefault(member.rpartition("-")[0], []).append((part, member))
        jobs = []
        for domain, members in tasks.items():
            for split in ("train", HELDOUT):
                (new / domain / split).mkdir(parents=True)
                mine = [m for m in members if (m[1] == f"{domain}-{HELDOUT}.xz") == (split == HELDOUT)]
                jobs += [(*m, new / domain / split / f"part-{i:05d}.arrow") for i, m in enumerate(mine)]
        if processes == 1:
            entries = [_write_shard(*job) for job in jobs]
        else:
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
                entries = list(pool.map(_write_shard, *zip(*jobs, strict=True)))
        arguments = {"pack": abouts[0][0]["pack"], "parts": len(abouts)}
        return {domain: _finish(new, domain, jobs, entries, arguments) for domain in tasks}


def _finish(new: Path, domain: str, jobs: list[tuple], entries: list[dict], arguments: dict) -> dict[str, int]:
    """Make the shards of a domain a corpus. Return the tokens of its splits."""
    folder = new / domain
    load_tokenizer(new / "tokenizer").save(folder / "tokenizer")
    splits = {}
    for split in ("train", HELDOUT):
        mine = [e for job, e in zip(jobs, entries, strict=True) if job[2].parent == folder / split]
        splits[split] = finish_split(folder, split, "uint16", [{"splits": {split: entry}} for entry in mine])
    if (text := new / f"{domain}-{HELDOUT}.jsonl").is_file():
        text.rename(folder / f"{HELDOUT}.jsonl")
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_json(folder / "manifest.json", describe(tokenizer, splits, {}, arguments))
    return {split: entry["tokens"] for split, entry in splits.items()}


def _write_shard(part: Path, member: str, path: Path) -> dict[str, Any]:
    """Write a chunk's documents as a shard. Return its entry in the manifest, with the bytes of its text."""
    documents = Documents.of(_decompressed(_member(part, member), part))
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
