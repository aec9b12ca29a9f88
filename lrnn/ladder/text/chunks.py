"""Turn text into token ids: one tokenizer for all domains, then chunks that hold the same share of every domain.

`chunks/code-0007.xz` holds the documents of `text/code/train-0007.jsonl`, compressed: three int64 (documents, tokens,
bytes of text), the number of tokens of every document (int32), and the tokens of all documents (uint16). Beside it,
`code-0007.json` counts its documents by package.
"""

import hashlib
import json
import lzma
import math
import multiprocessing
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lrnn.errors import UserError
from lrnn.files import replace_folder, write_atomically, write_json
from lrnn.ladder.text.assemble import CHUNKS
from lrnn.ladder.text.table import DOMAINS
from lrnn.pretrain.corpus.shard_writer import watch_parent
from lrnn.tokenizer import load_tokenizer, train_sentencepiece
from lrnn.traces.training import training_document

VOCAB_SIZE = 16_384
SAMPLE_BYTES = 16_000_000  # of text to train the tokenizer on
SHARES = {"code": 0.62, "mathematics": 0.23, "prose": 0.15}  # of that text
EXCERPT = 20_000  # characters that a document gives to it at most
TRACES = "traces"
TRACES_SHARE = 0.03  # of all tokens
TRACES_MOST_CHANGES = 128
TRACES_APART = 1 << 32  # numbers of documents of programs from one chunk to the next
HELDOUT_TRACES = 200  # documents
HELDOUT = "heldout"
# Ids are two bytes: pb and lp of 1 say so. The window covers a chunk of code. Preset 6 takes 4 times as long and saves
# 14%; the text itself compresses to the same size as its ids.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 1 << 25, "lc": 3, "lp": 1, "pb": 1}]
BATCH_CHARACTERS = 1 << 20


class Documents(NamedTuple):
    """The documents of a chunk.

    Attributes:
        tokens: uint16, of all documents.
        lengths: int32, tokens of each.
        num_bytes: of their text.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: int

    def compressed(self) -> bytes:
        """Return them as the content of a chunk's file."""
        header = np.array([len(self.lengths), len(self.tokens), self.num_bytes], dtype="<i8")
        raw = header.tobytes() + self.lengths.astype("<i4").tobytes() + self.tokens.astype("<u2").tobytes()
        return lzma.compress(raw, check=lzma.CHECK_CRC64, filters=XZ)

    @classmethod
    def of(cls, raw: bytes) -> "Documents":
        """Return the documents in the decompressed content of a chunk's file."""
        documents, tokens, num_bytes = (int(n) for n in np.frombuffer(raw, dtype="<i8", count=3))
        lengths = np.frombuffer(raw, dtype="<i4", count=documents, offset=24)
        return cls(np.frombuffer(raw, dtype="<u2", count=tokens, offset=24 + 4 * documents), lengths, num_bytes)


def make_tokenizer(folder: Path, say: Callable[[str], None]) -> Path:
    """Train the tokenizer on a sample of `FOLDER/text`, unless that was done. Return its folder, `FOLDER/tokenizer`.

    Raises:
        UserError: the tokenizer there was trained on other text.
    """
    out, key = folder / "tokenizer", _text_key(folder)
    if (out / "trained_on.json").is_file():
        if json.loads((out / "trained_on.json").read_text()) != {"text": key}:
            raise UserError(f"{out} was trained on other text; remove it to train another and make all chunks again")
        return out
    shutil.rmtree(folder / "chunks", ignore_errors=True)  # they hold ids of another tokenizer
    texts = list(_sample(folder / "text"))
    say(f"training a tokenizer of {VOCAB_SIZE} pieces on {sum(map(len, texts)) / 1e6:.1f} million characters")
    with replace_folder(out) as new:
        train_sentencepiece(texts, VOCAB_SIZE, new / "trained.model")
        load_tokenizer(new / "trained.model").save(new / "saved")
        for file in (new / "saved").iterdir():
            file.rename(new / file.name)
        (new / "saved").rmdir()
        (new / "trained.model").unlink()
        write_json(new / "trained_on.json", {"text": key})
    return out


def make_chunks(folder: Path, enough: float, processes: int, say: Callable[[str], None]) -> None:
    """Tokenise `FOLDER/text` into `FOLDER/chunks`, in order. Chunks that are there already are kept.

    Args:
        enough: how many tokens to stop after.
    """
    tokenizer = make_tokenizer(folder, say)
    out = folder / "chunks"
    out.mkdir(exist_ok=True)
    domains = [domain for domain in DOMAINS if (folder / "text" / domain).is_dir()]

    def make(numbers: Iterable[int]) -> None:
        left = [number for number in numbers if not (out / f"{_name(TRACES, number)}.json").is_file()]
        tasks = [(number, domains, folder / "text", tokenizer, out) for number in left]
        for done, number in enumerate(_make_all(tasks, processes), 1):
            say(f"chunk {_name('', number)[1:]} is made; {len(left) - done} left")

    make([-1, 0])
    first = counts_of(out, "0000")["train"].values()
    each = sum(entry["tokens"] for packages in first for entry in packages.values())
    make(range(1, min(CHUNKS, math.ceil(min(enough / each, CHUNKS)))))


def _make_all(tasks: list[tuple], processes: int) -> Iterator[int]:
    if processes == 1:
        yield from (make_chunk(*task) for task in tasks)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), watch_parent) as pool:
        try:
            for future in as_completed([pool.submit(make_chunk, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_chunk(number: int, domains: list[str], text: Path, tokenizer: Path, out: Path) -> int:
    """Write the files of chunk `number` of all domains and of traces, in this order. -1 is the held-out text.

    Returns:
        `number`.
    """
    tokens = 0
    for domain in domains:
        documents, counts = encoded(_rows(text / domain, number), tokenizer)
        tokens += len(documents.tokens)
        _write(out, _name(domain, number), documents, counts)
    if number < 0:
        documents, counts = encoded(heldout_traces(), tokenizer)
    else:
        traces = (_trace(number * TRACES_APART + i) for i in count())
        documents, counts = encoded(traces, tokenizer, int(tokens * TRACES_SHARE / (1 - TRACES_SHARE)))
    _write(out, _name(TRACES, number), documents, counts)
    return number


def _name(domain: str, number: int) -> str:
    return f"{domain}-{HELDOUT if number < 0 else f'{number:04d}'}"


def _write(out: Path, name: str, documents: Documents, counts: dict) -> None:
    write_atomically(out / f"{name}.xz", documents.compressed())
    write_json(out / f"{name}.json", counts)


def heldout_traces() -> list[dict]:
    """Return the documents of programs that are held out."""
    return [_trace(-1 - i) for i in range(HELDOUT_TRACES)]


def _trace(number: int) -> dict:
    return {"text": training_document(number, TRACES_MOST_CHANGES), "package": TRACES}


def _rows(folder: Path, number: int) -> Iterator[dict]:
    """Yield the rows of a domain's files that belong to a chunk: one file, unless the domain has fewer files."""
    if number < 0:
        files = [folder / "heldout.jsonl"]
    else:
        trained = sorted(folder.glob("train-*.jsonl"))
        files = [file for i, file in enumerate(trained) if i * CHUNKS // len(trained) == number]
    for file in files:
        with open(file, "rb") as lines:
            yield from map(json.loads, lines)


_tokenizer_of = cache(load_tokenizer)  # loaded once per process


def encoded(rows: Iterable[dict], tokenizer: Path, enough: int | None = None) -> tuple[Documents, dict]:
    """Return rows as token ids, and their documents, bytes and tokens by package. Stop at `enough` tokens."""
    tool = _tokenizer_of(tokenizer)
    prefix, suffix = tool.document_prefix, tool.document_suffix
    arrays: list[np.ndarray] = []
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0, "tokens": 0})
    total = 0
    for batch in _batches(rows):
        for row, ids in zip(batch, tool.encode_batch([row["text"] for row in batch]), strict=True):
            if enough is not None and total >= enough:
                break
            arrays.append(np.array([*prefix, *ids, *suffix], dtype=np.uint16))
            total += len(arrays[-1])
            entry = counts[row["package"]]
            entry["documents"] += 1
            entry["bytes"] += len(row["text"].encode())
            entry["tokens"] += len(arrays[-1])
        if enough is not None and total >= enough:
            break
    tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint16)
    lengths = np.array([len(ids) for ids in arrays], dtype=np.int32)
    return Documents(tokens, lengths, sum(entry["bytes"] for entry in counts.values())), dict(counts)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    batch: list[dict] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row["text"])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _text_key(folder: Path) -> str:
    return hashlib.sha256((folder / "text/manifest.json").read_bytes()).hexdigest()


def _sample(text: Path) -> Iterator[str]:
    """Yield beginnings of documents, chosen by a hash, in the shares of the domains; and traces."""
    for domain, share in SHARES.items():
        files = sorted((text / domain).glob("train-*.jsonl"))
        size = sum(file.stat().st_size for file in files)
        # Long documents are cut, so that three times as many are looked at, until there is enough.
        most = min(2**32, int(2**32 * 3 * share * SAMPLE_BYTES / max(1, size)))
        taken = 0
        for file in files:
            with open(file, "rb") as lines:
                for line in lines:
                    if taken < share * SAMPLE_BYTES and zlib.crc32(line) < most:
                        yield (excerpt := json.loads(line)["text"][:EXCERPT])
                        taken += len(excerpt)
    yield from (_trace(number)["text"] for number in range(int(TRACES_SHARE * SAMPLE_BYTES / 5000)))


def counts_of(chunks: Path, number: str = "*") -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Return the documents, bytes and tokens of the chunks of a number, or all, by split, domain and package."""
    total: dict = {"train": {}, HELDOUT: {}}
    for file in sorted(chunks.glob(f"*-{number}.json")):
        domain, _, number = file.stem.rpartition("-")
        split = total[HELDOUT if number == HELDOUT else "train"].setdefault(domain, {})
        for package, entry in json.loads(file.read_text()).items():
            mine = split.setdefault(package, dict.fromkeys(entry, 0))
            for key, value in entry.items():
                mine[key] += value
    return total
