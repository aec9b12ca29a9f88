"""Pack chunks into parts of at most 56 MiB, each with a share of every domain.

A part is a tar file: the chunks of some consecutive numbers, of all domains, and `part.json`. The first part also holds
the tokenizer and the held-out text. Parts 0 to K are enough for a run that reads no more tokens than they hold, and
stay the same when more chunks are made and packed, but for the last.
"""

import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from lrnn.errors import UserError
from lrnn.files import replace_folder, write_json
from lrnn.ladder.text.chunks import HELDOUT, TRACES, counts_of, heldout_traces
from lrnn.ladder.text.table import DOMAINS

FORMAT = 1
MOST_BYTES = 56 << 20  # of a part
PRESET = 1  # of xz for held-out text: 4 times as fast as the default of 6, for 2 MB more
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
            first[f"{domain}-{HELDOUT}.jsonl.xz"] = lzma.compress(text.read_bytes(), preset=PRESET)
    programs = "".join(json.dumps(row) + "\n" for row in heldout_traces())
    first[f"{TRACES}-{HELDOUT}.jsonl.xz"] = lzma.compress(programs.encode(), preset=PRESET)
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
    for name, content in sorted(first.items()):
        key.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    with replace_folder(folder / "parts") as new:
        for index, numbers in enumerate(groups):
            tokens = _tokens(chunks, numbers)
            about = {"format": FORMAT, "pack": key.hexdigest(), "part": index, "chunks": numbers, "tokens": tokens}
            files = [file for number in numbers for file in sorted(chunks.glob(f"*-{number:04d}.xz"))]
            with tarfile.open(new / f"part-{index:02d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                _add(tar, "part.json", json.dumps(about, indent=1).encode())
                for name, content in first.items() if index == 0 else ():
                    _add(tar, name, content)
                for file in files:
                    _add(tar, file.name, file.read_bytes())
            size = (new / f"part-{index:02d}.tar").stat().st_size
            say(f"part {index}: {size / 2**20:.1f} MiB, {sum(tokens.values()) / 1e6:.1f} million tokens")
        write_json(new / "counts.json", counts_of(chunks))
    return sorted((folder / "parts").glob("part-*.tar"))


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
