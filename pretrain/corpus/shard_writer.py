"""Turn one part of a source into a shard of each split: an Arrow stream file with one list of `tokens` per document.

Each shard has a table beside it, see `shard_table`.
"""

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from io import RawIOBase
from itertools import chain
from pathlib import Path

import numpy as np

from lrnn.files import write_atomically, write_json
from lrnn.pretrain.corpus import shard_table
from lrnn.pretrain.corpus.source import Document, Part, is_heldout
from lrnn.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARS = 1 << 20  # characters that the tokenizer gets at once
FLUSH_TOKENS = 1 << 20  # tokens per record batch: 2 to 4 MB in memory


def token_dtype(vocab_size: int) -> str:
    """Return the smallest dtype that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class _HashingFile(RawIOBase):
    """A file that computes its sha256, the checksums of its blocks and its size while it is written."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115, closed in close()
        self.sha256 = hashlib.sha256()
        self.blocks = shard_table.BlockDigests()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.sha256.update(data)
        self.blocks.update(memoryview(data))
        self.size += len(data)
        return self._file.write(data)

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


class ShardWriter:
    """Write documents (lists of ids) to `path`, and its table beside it.

    Both appear under their names only after `close` has written them completely.
    """

    def __init__(self, path: Path, dtype: str):
        import pyarrow as pa

        self._pa = pa
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._dtype = np.dtype(dtype)
        self._schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(self._dtype)))])
        self._file = _HashingFile(self._temporary)
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._pending: list[list[int]] = []
        self._pending_tokens = 0
        self._documents = self._tokens = 0
        self._max_token_id = -1

    def write(self, documents: list[list[int]]) -> None:
        """Add documents. At most `FLUSH_TOKENS` plus the documents of one call are held in memory."""
        self._pending += documents
        self._pending_tokens += sum(map(len, documents))
        if self._pending_tokens >= FLUSH_TOKENS:
            self._flush()

    def write_flat(self, values: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents as one record batch: their joined ids ([n], the shard's dtype) and the length of each."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        assert values.dtype == self._dtype and offsets[-1] == len(values)
        column = self._pa.ListArray.from_arrays(self._pa.array(offsets), self._pa.array(values))
        self._stream.write_batch(self._pa.record_batch([column], schema=self._schema))
        self._documents += len(lengths)
        self._tokens += len(values)
        self._max_token_id = max(self._max_token_id, int(values.max()))

    def _flush(self) -> None:
        if self._pending:
            values = np.fromiter(chain.from_iterable(self._pending), dtype=self._dtype, count=self._pending_tokens)
            self.write_flat(values, np.array([len(document) for document in self._pending]))
            self._pending, self._pending_tokens = [], 0

    def close(self) -> dict:
        """Finish the file. Return its entry in the manifest, without `file`."""
        self._flush()
        self._stream.close()
        self._file.close()
        layout = shard_table.batch_layout(self._temporary)
        table = shard_table.pack_table(self._file.blocks.digests(), layout)
        write_atomically(self._path.with_name(self._path.name + shard_table.SUFFIX), table)
        os.replace(self._temporary, self._path)
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "max_token_id": self._max_token_id,
            "sha256": self._file.sha256.hexdigest(),
            "size": self._file.size,
            "table_sha256": hashlib.sha256(table).hexdigest(),
        }


def _encoded(part: Part, tokenizer: Tokenizer) -> Iterator[list[tuple[Document, list[int]]]]:
    """Yield the documents of a part with their ids, in batches."""
    batch: list[Document] = []
    chars = 0
    for document in part.documents():
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield list(zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True))
            batch, chars = [], 0
    if batch:
        yield list(zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True))


_tokenizer_of = cache(load_tokenizer)  # Loaded once per process.


def write_part(part: Part, index: int, work: Path, heldout: float) -> dict:
    """Tokenise one part with the tokenizer in `work`, into a shard of each split and the text of held-out documents.

    `done/INDEX.json` is written last, and says that the part is complete.

    Returns:
        The content of that file.
    """
    tokenizer = _tokenizer_of(work / "tokenizer")
    splits = ["train", "heldout"] if heldout > 0 else ["train"]
    writers = {s: ShardWriter(work / s / f"part-{index:05d}.arrow", token_dtype(tokenizer.vocab_size)) for s in splits}
    num_bytes = dict.fromkeys(splits, 0)
    skipped: Counter[str] = Counter()
    prefix, suffix = tokenizer.document_prefix, tokenizer.document_suffix
    text_path = work / "done" / f"{index:05d}.jsonl"
    with open(text_path, "w", encoding="utf-8") if heldout > 0 else nullcontext() as text_file:
        for batch in _encoded(part, tokenizer):
            documents: dict[str, list[list[int]]] = {s: [] for s in splits}
            for document, ids in batch:
                if not ids:
                    skipped["no tokens" if document.text else "empty text"] += 1
                    continue
                split = "heldout" if is_heldout(document.digest, heldout) else "train"
                documents[split].append([*prefix, *ids, *suffix])
                num_bytes[split] += len(document.text.encode("utf-8"))
                if split == "heldout" and text_file is not None:
                    text_file.write(json.dumps({"text": document.text, "source": document.source}) + "\n")
            for s in splits:
                writers[s].write(documents[s])
    entry = {
        "splits": {s: {**writers[s].close(), "bytes": num_bytes[s]} for s in splits},
        "skipped": dict(skipped + part.left_out.counts),
        "num_bytes": part.num_bytes,
    }
    write_json(work / "done" / f"{index:05d}.json", entry)
    return entry


def watch_parent() -> None:
    """Make a worker process end with its parent, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
