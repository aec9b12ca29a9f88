"""Test a corpus that is damaged, cut off or removed while it is read: intact data is correct, damage is named."""

import errno
import gc
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from lrnn.errors import UserError
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.corpus import block_reader, shard_table
from lrnn.pretrain.corpus.block_reader import BLOCK_BYTES, CorruptData
from lrnn.pretrain.corpus.reader import FORMAT, FORMAT_VERSION, TokenCorpus
from lrnn.pretrain.corpus.shard_writer import ShardWriter
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.samples import CorpusData

SHARD = "train/data-1.arrow"


def write_corpus(path: Path, dtype: str = "uint16", shards: int = 3, batches: int = 3, documents: int = 21_000) -> Path:
    """Write random ids in short documents; ids and offsets of a record batch both take more than a block by default."""
    rng = np.random.default_rng(0)
    (path / "train").mkdir(parents=True)
    entries = []
    for number in range(shards):
        writer = ShardWriter(path / f"train/data-{number}.arrow", dtype)
        for _ in range(batches):
            lengths = rng.integers(1, 8, size=documents)
            writer.write_flat(rng.integers(0, 60_000, size=int(lengths.sum())).astype(dtype), lengths)
        entries.append({"file": f"train/data-{number}.arrow", **writer.close()})
    split = {name: sum(entry[name] for entry in entries) for name in ("documents", "tokens")} | {"shards": entries}
    tokenizer = {"fingerprint": "0" * 64, "vocab_size": 60_000}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": dtype, "tokenizer": tokenizer}
    (path / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": split}}))
    return path


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def whole(request, tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("whole") / "corpus", request.param)


@pytest.fixture
def path(tmp_path) -> Path:
    """Return a corpus to damage."""
    return write_corpus(tmp_path / "corpus")


def arrow_truth(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and document starts of the whole stream, as pyarrow reads the shards."""
    shards = json.loads((path / "manifest.json").read_text())["splits"]["train"]["shards"]
    tables = [pa.ipc.open_stream(pa.OSFile(str(path / shard["file"]))).read_all() for shard in shards]
    column = pa.concat_tables(tables).column("tokens").combine_chunks()
    return column.values.to_numpy(), column.offsets.to_numpy()[:-1]


def read_all(corpus: TokenCorpus) -> None:
    corpus.tokens(0, corpus.num_tokens)
    corpus.document_starts(0, corpus.num_tokens)


def open_files(path: Path) -> int:
    """Return the descriptors of files under `path` that this process holds."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:  # Another thread closed it meanwhile.
            continue
    return sum(link.startswith(str(path)) for link in links)


# --- intact data ------------------------------------------------------------------------------------------------------


def test_reads_are_what_arrow_reads(whole):
    ids, starts = arrow_truth(whole)
    corpus = TokenCorpus(whole)
    assert corpus.num_tokens == len(ids) and corpus.num_documents == len(starts)
    rng = np.random.default_rng(1)
    anywhere = np.sort(rng.integers(0, len(ids) + 1, size=(300, 2)))
    short = anywhere[:, :1] + np.array([[0, 2049]])
    batches = np.array(corpus._starts)
    assert len(batches) == 9
    # Around the first ids of batches (and so of shards), and around the first and last ids of blocks.
    per_block = BLOCK_BYTES // ids.itemsize
    blocks = [
        start + first
        for start, batch in zip(corpus._starts, corpus._batches, strict=True)
        for first in range(-batch.ids_at % BLOCK_BYTES // ids.itemsize, batch.num_ids, per_block)
    ]
    assert len(blocks) > 15
    edges = np.concatenate([batches, blocks, [len(ids)]])
    near = np.concatenate([edges[:, None] + np.array([[a, b]]) for a in (-2, -1, 0) for b in (0, 1, 2)])
    for start, stop in np.clip(np.concatenate([anywhere, short, near, [[0, len(ids)]]]), 0, len(ids)).tolist():
        found = corpus.tokens(start, stop)
        assert found.dtype == ids.dtype and np.array_equal(found, ids[start:stop])
        found = corpus.document_starts(start, stop)
        assert found.dtype == np.int64
        assert np.array_equal(found, starts[np.searchsorted(starts, start) : np.searchsorted(starts, stop)])


def test_ids_are_a_view_that_cannot_be_written_to(whole):
    ids = TokenCorpus(whole).tokens(10, 20)
    assert not ids.flags.owndata and not ids.flags.writeable


def test_short_reads_are_completed(whole, monkeypatch):
    """A network file system may return fewer bytes than requested."""
    ids, starts = arrow_truth(whole)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 5000), offset))
    corpus = TokenCorpus(whole)
    assert np.array_equal(corpus.tokens(0, len(ids)), ids)
    assert np.array_equal(corpus.document_starts(0, len(ids)), starts)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 200_001])
def test_digests_do_not_depend_on_the_writes(size):
    rng = random.Random(size)
    data = rng.randbytes(size)
    expected = [xxhash.xxh3_64(data[at : at + BLOCK_BYTES]).digest() for at in range(0, size, BLOCK_BYTES)]
    for longest in (1000, 10 * BLOCK_BYTES):
        digests, at = shard_table.BlockDigests(), 0
        while at < size:
            step = rng.randint(0, longest)
            digests.update(memoryview(data)[at : at + step])
            at += step
        assert digests.digests() == b"".join(expected)


# --- damaged data -----------------------------------------------------------------------------------------------------


def named_bytes(error: CorruptData, path: Path, words: str) -> tuple[int, int]:
    """Return the range of bytes that a message names, and check that it names the corpus, the shard and a remedy."""
    message = str(error)
    assert message.startswith(f"corpus {path}: shard {SHARD} ") and re.search(words, message), message
    assert "copy the shard again" in message and "build the corpus again" in message and "the same command" in message
    found = re.search(r"bytes (\d+) to (\d+)", message)
    assert found, message
    return int(found[1]), int(found[2])


def parts_of(corpus: TokenCorpus) -> Iterator[tuple[int, int, int, Callable[[], object]]]:
    """Yield (shard, first byte, last byte, how to read it) of single ids, and of the offsets of each batch."""
    for number, (start, batch) in enumerate(zip(corpus._starts, corpus._batches, strict=True)):
        shard = number // 3
        for i in range(0, batch.num_ids, BLOCK_BYTES // 8):
            at = batch.ids_at + 2 * i
            yield shard, at, at + 2, partial(corpus.tokens, start + i, start + i + 1)
        stop = batch.offsets_at + 4 * batch.num_documents
        yield shard, batch.offsets_at, stop, partial(corpus.document_starts, start, start + 1)


def test_any_flipped_bit_is_noticed_where_it_is(path):
    good = (path / SHARD).read_bytes()
    assert len(good) % BLOCK_BYTES > 1000  # The last block holds ids too, not only the end mark.
    rng = random.Random(0)
    messages = [match.start() for match in re.finditer(rb"\xff{4}[^\0]\0\0\0.\0\0\0", good, re.DOTALL)]
    assert len(messages) == 4  # headers inside the file: one of the schema, three of batches
    positions = [at + rng.randrange(100) for at in messages for _ in range(5)]
    positions += [0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(100))]
    for at in positions:
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        (path / SHARD).write_bytes(data)
        corpus = TokenCorpus(path)
        begin = at // BLOCK_BYTES * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, len(good))
        with pytest.raises(CorruptData) as error:
            read_all(corpus)
        assert named_bytes(error.value, path, "is corrupt in bytes") == (begin, end)
        for shard, first, last, read in parts_of(corpus):
            if shard == 1 and first < end and last > begin:
                with pytest.raises(CorruptData):
                    read()
            else:
                read()


@pytest.mark.parametrize("held", [False, True])
def test_cut_off_after_opening(path, held):
    """With mapped memory the process would die of SIGBUS here."""
    size = (path / SHARD).stat().st_size
    corpus = TokenCorpus(path)
    first, last = corpus._starts[3], corpus._starts[6] - 1  # in the second shard
    if held:
        corpus.tokens(first, first + 1)
    os.truncate(path / SHARD, size - 1)
    corpus.tokens(first, first + 1)
    with pytest.raises(CorruptData) as error:
        corpus.tokens(last, last + 1)
    begin, end = named_bytes(error.value, path, f"was cut off.* it ends at byte {size - 1} of {size}")
    assert begin == size // BLOCK_BYTES * BLOCK_BYTES and end == size
    os.truncate(path / SHARD, 3 * BLOCK_BYTES)
    corpus.tokens(first, first + 1)
    with pytest.raises(CorruptData, match=f"ends at byte {3 * BLOCK_BYTES} of {size}"):
        read_all(corpus)
    os.truncate(path / SHARD, 0)
    with pytest.raises(CorruptData, match=f"ends at byte 0 of {size}"):
        corpus.document_starts(first, first + 1)
    corpus.tokens(0, first)
    corpus.tokens(last + 1, corpus.num_tokens)


def test_vanished_after_opening(path):
    corpus = TokenCorpus(path)
    first = corpus._starts[3]
    (path / SHARD).unlink()
    with pytest.raises(CorruptData) as error:
        corpus.tokens(first, first + 1)
    assert named_bytes(error.value, path, r"cannot be read in bytes \d+ to \d+ \(No such file")[0] < 2 * BLOCK_BYTES
    corpus.tokens(0, first)
    held = TokenCorpus(write_corpus(path.with_name("held")))
    held.tokens(first, first + 1)
    (path.with_name("held") / SHARD).unlink()
    read_all(held)  # Open files stay readable.


@pytest.mark.parametrize(
    ("call", "number"),
    [("pread", errno.EIO), ("pread", errno.ESTALE), ("open", errno.EACCES), ("open", errno.ENOTCONN)],
)
def test_reads_that_fail(path, monkeypatch, call, number):
    corpus = TokenCorpus(path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CorruptData) as error:
            corpus.tokens(corpus._starts[3], corpus._starts[3] + 1)
    named_bytes(error.value, path, re.escape(f"({os.strerror(number)})"))
    read_all(corpus)


def test_damaged_table(path):
    table = path / f"{SHARD}.table"
    good = table.read_bytes()
    name = re.escape(f"corpus {path}: shard {SHARD}.table, its table of checksums, ")
    rng = random.Random(0)
    for _ in range(50):
        data = bytearray(good)
        data[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        table.write_bytes(data)
        with pytest.raises(UserError, match=name + "is corrupt .sha256 .* copy the shard again"):
            TokenCorpus(path)
    for other in (good[:-1], b"", (path / "train/data-0.arrow.table").read_bytes()):
        table.write_bytes(other)
        with pytest.raises(UserError, match=name + "is corrupt"):
            TokenCorpus(path)
    table.unlink()
    with pytest.raises(UserError, match=name + "cannot be read .No such file"):
        TokenCorpus(path)


def test_a_shard_in_place_of_another(path):
    """Two corpora were mixed up: everything is readable and has the right size."""
    write_corpus(path.with_name("other"), "uint32")
    other = (path.with_name("other") / SHARD).read_bytes()
    size = (path / SHARD).stat().st_size
    (path / SHARD).write_bytes(other[:size])
    with pytest.raises(CorruptData, match=f"{SHARD} is corrupt in bytes"):
        read_all(TokenCorpus(path))


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_many_shards_and_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "MAX_OPEN_FILES", 4)
    path = write_corpus(tmp_path / "corpus", shards=40, batches=1, documents=100)
    ids, starts = arrow_truth(path)
    corpus = TokenCorpus(path)
    assert open_files(path) == 0
    most = 0

    def read(seed: int) -> None:
        nonlocal most
        rng = random.Random(seed)
        for _ in range(500):
            start = rng.randrange(len(ids) - 50)
            assert np.array_equal(corpus.tokens(start, start + 50), ids[start : start + 50])
            found = corpus.document_starts(start, start + 50)
            assert np.array_equal(found, starts[(starts >= start) & (starts < start + 50)])
            most = max(most, open_files(path))

    read(0)
    assert most == 4
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert most <= 4 + 2 * 4  # Each thread may read from one that was dropped, and open another.
    assert open_files(path) == 4


def test_descriptors_are_closed_with_the_corpus(path):
    corpus = TokenCorpus(path)
    read_all(corpus)
    assert open_files(path) == 3
    del corpus
    gc.collect()
    assert open_files(path) == 0


def test_the_descriptor_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(block_reader, "MAX_OPEN_FILES", 2)
    path = write_corpus(tmp_path / "corpus", shards=3, batches=1, documents=10)
    corpus = TokenCorpus(path)
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda file, *rest: opened.append(Path(file).name) or real(file, *rest))
    for shard in (0, 1, 0, 0, 2, 0, 1, 2):
        corpus.tokens(corpus._starts[shard], corpus._starts[shard] + 1)
    assert opened == [f"data-{i}.arrow" for i in (0, 1, 2, 1, 2)]


def test_descriptors_are_closed_when_python_exits(path, monkeypatch):
    """Modules may be gone before the last objects; an error would then be printed below the last line of a run."""
    errors: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    corpus = TokenCorpus(path)
    corpus.tokens(0, 9)
    assert open_files(path) == 1
    with monkeypatch.context() as patch:
        patch.setattr(block_reader, "os", None)
        del corpus
        gc.collect()
    assert open_files(path) == 0 and not errors


# --- in the loader ----------------------------------------------------------------------------------------------------


def test_loader_names_the_samples(path):
    """The steps before the damage are complete; the step that contains it is an error."""
    data = bytearray((path / SHARD).read_bytes())
    data[2 * BLOCK_BYTES + 100] ^= 4  # among ids; offsets would spoil every sample of their record batch
    (path / SHARD).write_bytes(data)
    source = CorpusData([TokenCorpus(path)], [1.0], seq_len=256, seed=4)

    def readable(sample: int) -> bool:
        try:
            source.batch(np.array([sample]))
        except CorruptData as error:
            assert f"(while reading samples {sample})" in str(error)
            return False
        return True

    bad = next(sample for sample in range(source.num_windows) if not readable(sample))
    assert bad >= 16  # Otherwise the test would show little.
    first = bad // 4 * 4
    with Loader(source, Batching(8, 4)) as loader:
        for step in range(bad // 8):
            assert [b.sample_indices.tolist() for b in next(loader)] == [
                list(range(8 * step + m, 8 * step + m + 4)) for m in (0, 4)
            ]
        with pytest.raises(CorruptData) as error:
            next(loader)
    assert named_bytes(error.value, path, "is corrupt") == (2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    assert str(error.value).endswith(f"(while reading samples {first}..{first + 3})")
    with pytest.raises(CorruptData, match=rf"samples {bad}..{bad + 1}, 2, 7..8\)"):
        source.batch(np.array([bad, bad + 1, 2, 7, 8]))


def test_fingerprint_is_that_of_the_shards(path):
    """It identifies the data that a run was trained on, so it does not include the tables."""
    sums = "".join(hashlib.sha256((path / f"train/data-{i}.arrow").read_bytes()).hexdigest() for i in range(3))
    assert TokenCorpus(path).fingerprint == hashlib.sha256(sums.encode()).hexdigest()
