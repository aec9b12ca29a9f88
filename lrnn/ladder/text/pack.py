"""Pack chunks into parts of at most 56 MiB, and unpack parts into corpora: `python -m lrnn.ladder.text.pack --help`.

A part is a tar file: the chunks of some consecutive numbers, of all domains, and `part.json`. The first part also holds
the tokenizer and the held-out text. Parts 0 to K are enough for a run that reads no more tokens than they hold.
"""

import argparse
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.files import new_folder, replace_folder, write_json
from lrnn.ladder.text.chunks import HELDOUT, TRACES, Documents, counts_of
from lrnn.ladder.text.table import DOMAINS
from lrnn.pretrain.corpus.finish import describe, finish_split
from lrnn.pretrain.corpus.shard_writer import ShardWriter, watch_parent
from lrnn.tokenizer import load_tokenizer

FORMAT = 1
MOST_BYTES = 56 << 20  # of a part
BATCH_TOKENS = 1 << 20  # of a record batch in a shard
_PART_BYTES = 1 << 15  # for `part.json` and the end of a tar file


def pack(folder: Path, say: Callable[[str], None], most_bytes: int = MOST_BYTES) -> list[Path]:
    """Write `FOLDER/parts/part-*.tar` from the chunks, tokenizer and held-out text in FOLDER. Return the parts.

    Raises:
        UserError: a chunk is missing, or is larger than a part may be.
    """
    chunks = folder / "chunks"
    first = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted((folder / "tokenizer").iterdir())}
    for domain in DOMAINS:
        if (text := folder / f"text/{domain}/{HELDOUT}.jsonl").is_file():
            first[f"{domain}-{HELDOUT}.jsonl.xz"] = lzma.compress(text.read_bytes())
    first |= {file.name: file.read_bytes() for file in sorted(chunks.glob(f"*-{HELDOUT}.xz"))}
    groups: list[list[int]] = [[]]
    room = most_bytes - _tar_size(map(len, first.values()))
    for number in _made(chunks):
        size = _tar_size(file.stat().st_size for file in chunks.glob(f"*-{number:04d}.xz"))
        if size + _PART_BYTES > room:
            groups.append([])
            room = most_bytes
        if size + _PART_BYTES > room:
            raise UserError(f"chunk {number} has {size} bytes, more than fit into a part of {most_bytes}")
        groups[-1].append(number)
        room -= size
    key = hashlib.sha256()
    for file in sorted(chunks.glob("*.xz")):
        key.update(f"{file.name} {file.stat().st_size}\n".encode())
    with replace_folder(folder / "parts") as new:
        for index, numbers in enumerate(groups):
            about = {"format": FORMAT, "pack": key.hexdigest(), "part": index, "parts": len(groups), "chunks": numbers}
            files = [file for number in numbers for file in sorted(chunks.glob(f"*-{number:04d}.xz"))]
            about["tokens"] = _tokens(chunks, numbers)
            with tarfile.open(new / f"part-{index:02d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                _add(tar, "part.json", json.dumps(about, indent=1).encode())
                for name, content in first.items() if index == 0 else ():
                    _add(tar, name, content)
                for file in files:
                    _add(tar, file.name, file.read_bytes())
            size = (new / f"part-{index:02d}.tar").stat().st_size
            say(f"part {index}: {size / 2**20:.1f} MiB, {sum(about['tokens'].values()) / 1e6:.1f} million tokens")
        write_json(new / "counts.json", counts_of(chunks))
    return sorted((folder / "parts").glob("part-*.tar"))


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
    import numpy as np

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


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _tar_size(sizes: Iterable[int]) -> int:
    """Return the most bytes that files of these sizes take in a tar file: a header each, and blocks of 512 bytes."""
    return sum(size + 1024 for size in sizes)


def _made(chunks: Path) -> list[int]:
    """Return the numbers of the chunks that are complete. Raise UserError if one is missing between them."""
    numbers = sorted(int(file.stem.rpartition("-")[2]) for file in chunks.glob(f"{TRACES}-[0-9]*.json"))
    if not numbers or numbers != list(range(len(numbers))):
        missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
        raise UserError(f"{chunks} lacks chunk {missing}; run `python -m lrnn.ladder.text` again")
    return numbers


def _tokens(chunks: Path, numbers: list[int]) -> dict[str, int]:
    """Return the tokens of chunks by domain."""
    tokens: dict[str, int] = {}
    for number in numbers:
        for file in chunks.glob(f"*-{number:04d}.json"):
            domain = file.stem.rpartition("-")[0]
            counts = json.loads(file.read_text())
            tokens[domain] = tokens.get(domain, 0) + sum(entry["tokens"] for entry in counts.values())
    return tokens


def main() -> int:
    """Unpack parts into corpora."""
    parser = argparse.ArgumentParser("python -m lrnn.ladder.text.pack", description="Unpack parts into corpora.")
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
