"""Read a corpus: Arrow shards as one stream of tokens with document boundaries.

A corpus is a folder that `lrnn corpus` wrote (see `build`): `manifest.json`, `tokenizer/`, and one folder per split
with Arrow stream files, which `datasets.load_from_disk` can open too. Each file has a table of checksums beside it (see
`shard_table`). In Arrow a list column is a flat buffer of values plus offsets: the values are the token stream, the
offsets the document boundaries. Only the tables are read at the start, which takes hardly longer for a large corpus.
Whatever is read from a shard later is compared with its checksum every time (see `block_reader`).
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lrnn.errors import UserError
from lrnn.pretrain.corpus import shard_table
from lrnn.pretrain.corpus.block_reader import ADVICE, BlockFile
from lrnn.tokenizer import load_copy

FORMAT = "lrnn-corpus"
FORMAT_VERSION = 2


def read_manifest(path: str | Path) -> dict:
    """Return the manifest of the corpus in folder `path`.

    Raises:
        UserError: there is no complete corpus, or it has another format version.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except OSError as error:
        begun = path.with_name(path.name + ".partial")
        hint = (
            f"; {begun} is unfinished, run its `lrnn corpus` again"
            if begun.is_dir()
            else "; make one with `lrnn corpus`"
        )
        raise UserError(f"corpus {path}: no manifest.json ({error.strerror}){hint}") from error
    except ValueError as error:
        raise UserError(f"corpus {path}: manifest.json is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"corpus {path}: manifest.json is not the manifest of a corpus")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"corpus {path}: format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
            "build it again"
        )
    return manifest


def _open_shard(path: Path, shard: dict) -> tuple[BlockFile, np.ndarray]:
    """Return the shard for reading, and the layout of its record batches (see `shard_table.batch_layout`)."""
    label = f"corpus {path}: shard {shard['file']}"
    name = path / shard["file"]
    try:
        size = os.path.getsize(name)
        if size != shard["size"]:
            raise UserError(f"{label} has {size} bytes, the manifest says {shard['size']}; {ADVICE}")
    except OSError as error:
        raise UserError(f"{label} cannot be read ({error.strerror}); {ADVICE}") from error
    try:
        table = name.with_name(name.name + shard_table.SUFFIX).read_bytes()
    except OSError as error:
        raise UserError(
            f"{label}{shard_table.SUFFIX}, its table of checksums, cannot be read ({error.strerror}); {ADVICE}"
        ) from error
    digest = hashlib.sha256(table).hexdigest()
    if digest != shard["table_sha256"]:
        raise UserError(
            f"{label}{shard_table.SUFFIX}, its table of checksums, is corrupt (sha256 {digest[:12]}..., the manifest "
            f"says {shard['table_sha256'][:12]}...); {ADVICE}"
        )
    digests, layout = shard_table.unpack_table(table, size)
    return BlockFile(name, label, size, digests), layout


@dataclass(frozen=True, slots=True)
class _Batch:
    """A record batch."""

    shard: BlockFile
    offsets_at: int  # byte of the shard at which the offsets of its documents begin
    num_documents: int
    ids_at: int  # byte of the shard at which its ids begin
    num_ids: int


class TokenCorpus:
    """One split of a corpus as a stream of `num_tokens` tokens, with the documents one after the other.

    Args:
        path: the corpus folder.
        split: "train" or "heldout".

    Attributes:
        manifest: the parsed manifest.json.
        num_tokens, num_documents: size of the split.
        vocab_size: size of the tokenizer's vocabulary.
        tokenizer_file_sha256: sha256 of the tokenizer's file. Of a corpus of lrnn 0.1.0 it is the fingerprint.

    Raises:
        UserError: there is no such corpus or split, the split is empty, or a shard is missing, has another size, holds
            an id outside the vocabulary, or has a corrupt table. Damage to a shard's content is found when it is read.
    """

    def __init__(self, path: str | Path, split: str = "train"):
        self.path = Path(path)
        self.split = split
        self.manifest = read_manifest(self.path)
        if split not in self.manifest["splits"]:
            hint = "; build it with --heldout FRACTION" if split == "heldout" else ""
            raise UserError(f"corpus {path}: no split {split!r}, it has {sorted(self.manifest['splits'])}{hint}")
        description = self.manifest["splits"][split]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        described = self.manifest["tokenizer"]
        self.tokenizer_file_sha256: str = described.get("file_sha256", described["fingerprint"])
        self.num_tokens: int = description["tokens"]
        self.num_documents: int = description["documents"]
        if self.num_tokens == 0:
            raise UserError(f"corpus {path}: split {split!r} is empty")

        shards = description["shards"]
        with ThreadPoolExecutor(min(8, len(shards))) as pool:
            opened = list(pool.map(lambda shard: _open_shard(self.path, shard), shards))
        self._dtype = np.dtype(self.manifest["dtype"])
        self._batches: list[_Batch] = []
        self._starts: list[int] = []  # position in the stream of each batch's first token
        position = 0
        for shard, (file, layout) in zip(shards, opened, strict=True):
            if shard["max_token_id"] >= self.vocab_size:
                raise UserError(
                    f"corpus {path}: shard {shard['file']} holds token id {shard['max_token_id']}, outside of its "
                    f"tokenizer's vocabulary of {self.vocab_size}"
                )
            before = position
            for row in layout.tolist():
                batch = _Batch(file, *row)
                self._batches.append(batch)
                self._starts.append(position)
                position += batch.num_ids
            if position - before != shard["tokens"]:
                raise UserError(
                    f"corpus {path}: shard {shard['file']} holds {position - before} tokens, "
                    f"the manifest says {shard['tokens']}"
                )
        if position != self.num_tokens:
            raise UserError(f"corpus {path}: the shards hold {position} tokens, the manifest says {self.num_tokens}")

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Return the fingerprint of the tokenizer.

        For a Hugging Face tokenizer in a corpus of lrnn 0.1.0 it is computed from the corpus's copy.

        Raises:
            UserError: it has to be computed, and the tokenizer of the corpus cannot be loaded.
        """
        described = self.manifest["tokenizer"]
        if described.get("kind") == "huggingface" and "file_sha256" not in described:
            return load_copy(self.path / "tokenizer").fingerprint
        return described["fingerprint"]

    def _parts(self, start: int, stop: int) -> Iterator[tuple[_Batch, int, int, int]]:
        """Yield (batch, position of its first token, first and last of its own ids) of the batches in a range."""
        assert 0 <= start <= stop <= self.num_tokens
        for i in range(bisect_right(self._starts, start) - 1, len(self._batches)):
            batch, base = self._batches[i], self._starts[i]
            yield batch, base, max(start - base, 0), min(stop - base, batch.num_ids)
            if stop <= base + batch.num_ids:
                break

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the ids at positions `start` to `stop` of the stream: [stop - start] uint16 or uint32, read-only.

        Raises:
            CorruptData: they cannot be read as they were written.
        """
        width = self._dtype.itemsize
        pieces = [
            np.frombuffer(batch.shard.read(batch.ids_at + first * width, batch.ids_at + last * width), self._dtype)
            for batch, _, first, last in self._parts(start, stop)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the positions p, `start <= p < stop`, at which a document begins: int64, ascending.

        Raises:
            CorruptData: they cannot be read as they were written.
        """
        pieces = []
        for batch, base, first, last in self._parts(start, stop):
            stored = batch.shard.read(batch.offsets_at, batch.offsets_at + 4 * batch.num_documents)
            offsets = np.frombuffer(stored, np.dtype("<i4"))
            # With bounds of any other dtype than int32, numpy would convert the whole array of offsets.
            begin, end = np.searchsorted(offsets, np.array([first, last], dtype=np.int32), side="left")
            pieces.append(offsets[begin:end].astype(np.int64) + base)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def fingerprint(self) -> str:
        """Return a sha256 of the shards' checksums: the same for the same tokens in the same order."""
        sums = "".join(shard["sha256"] for shard in self.manifest["splits"][self.split]["shards"])
        return hashlib.sha256(sums.encode()).hexdigest()

    def __repr__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        return f"TokenCorpus({str(self.path)!r}, {self.split!r}, {size})"


def check_model_matches_corpora(
    vocab_size: int, tokenizer_fingerprint: str | None, corpora: Sequence[TokenCorpus]
) -> None:
    """Check that the ids of the corpora mean the same to the model.

    Args:
        vocab_size: number of rows of the model's embedding.
        tokenizer_fingerprint: fingerprint of the tokenizer that the model was trained with, or the SHA-256 of its file;
            None for a new model.
        corpora: corpora to train on.

    Raises:
        UserError: a vocabulary exceeds the embedding, or the tokenizers differ from each other or from the model's.
    """
    for corpus in corpora:
        if corpus.vocab_size > vocab_size:
            raise UserError(
                f"corpus {corpus.path}: its tokenizer has a vocabulary of {corpus.vocab_size}, the model's embedding "
                f"has only vocab_size={vocab_size}; set vocab_size to at least {corpus.vocab_size}"
            )
    for corpus in corpora[1:]:
        if corpus.tokenizer_fingerprint != corpora[0].tokenizer_fingerprint:
            raise UserError(
                f"corpora {corpora[0].path} and {corpus.path} were made with different tokenizers (fingerprints "
                f"{corpora[0].tokenizer_fingerprint[:12]}... and {corpus.tokenizer_fingerprint[:12]}...); build one of "
                f"them again with --tokenizer {corpora[0].path}/tokenizer"
            )
    if tokenizer_fingerprint is not None:
        for corpus in corpora:
            if tokenizer_fingerprint not in (corpus.tokenizer_fingerprint, corpus.tokenizer_file_sha256):
                raise UserError(
                    f"corpus {corpus.path}: made with another tokenizer than the model's (fingerprints "
                    f"{corpus.tokenizer_fingerprint[:12]}... and {tokenizer_fingerprint[:12]}...); "
                    "build it again with the model's tokenizer"
                )
