"""Read a corpus: memory-mapped Arrow shards seen as one stream of tokens with document boundaries.

A corpus is a folder that `lrnn corpus` wrote (see build_corpus.py): `manifest.json`, `tokenizer/`, and a folder a split
with Arrow stream files that `datasets.load_from_disk` opens as well. In Arrow a list column is a flat buffer of
values plus offsets: the values are the token stream, the offsets the document boundaries, and neither is copied here.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from lrnn.errors import UserError

FORMAT = "lrnn-corpus"
FORMAT_VERSION = 1


def read_manifest(path: str | Path) -> dict:
    """The manifest of the corpus in folder `path`.

    Raises:
        UserError: there is no complete corpus, or it is of another version.
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
        raise UserError(f"corpus {path}: manifest.json is not that of a corpus")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"corpus {path}: format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
            "build it again"
        )
    return manifest


def _check_shard(path: Path, shard: dict, checksum: bool) -> None:
    name = path / shard["file"]
    try:
        size = os.path.getsize(name)
        if size != shard["size"]:
            raise UserError(f"corpus {path}: shard {shard['file']} has {size} bytes, the manifest says {shard['size']}")
        if checksum:
            with open(name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard["sha256"]:
                raise UserError(
                    f"corpus {path}: shard {shard['file']} is corrupt (sha256 {digest[:12]}..., the manifest says "
                    f"{shard['sha256'][:12]}...); copy or build it again"
                )
    except OSError as error:
        raise UserError(f"corpus {path}: shard {shard['file']} cannot be read ({error.strerror})") from error


class TokenCorpus:
    """One split of a corpus as a stream of `num_tokens` tokens, documents one after the other.

    Args:
        path: the corpus folder.
        split: "train" or "heldout".
        verify: True compares the sha256 of every shard (reads them all, in threads); "size" compares sizes only.

    Attributes:
        manifest: the parsed manifest.json.
        num_tokens, num_documents, vocab_size: of the split, of the split, of the tokenizer.
        tokenizer_fingerprint: sha256 of the tokenizer's model file.

    Raises:
        UserError: no such corpus or split, an empty split, a shard that is missing, corrupt, or holds an id outside of
            the vocabulary.
    """

    def __init__(self, path: str | Path, split: str = "train", verify: Literal[True, "size"] = True):
        self.path = Path(path)
        self.split = split
        self.manifest = read_manifest(self.path)
        if split not in self.manifest["splits"]:
            hint = "; build it with --heldout FRACTION" if split == "heldout" else ""
            raise UserError(f"corpus {path}: no split {split!r}, it has {sorted(self.manifest['splits'])}{hint}")
        description = self.manifest["splits"][split]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.tokenizer_fingerprint: str = self.manifest["tokenizer"]["fingerprint"]
        self.num_tokens: int = description["tokens"]
        self.num_documents: int = description["documents"]
        if self.num_tokens == 0:
            raise UserError(f"corpus {path}: split {split!r} is empty")

        shards = description["shards"]
        with ThreadPoolExecutor(min(8, len(shards))) as pool:
            for _ in pool.map(lambda shard: _check_shard(self.path, shard, verify is True), shards):
                pass
        self._values: list[np.ndarray] = []  # token ids, one array a record batch
        self._offsets: list[np.ndarray] = []  # int32, where its documents start, and its length
        self._starts: list[int] = []  # position of its first token in the stream
        position = 0
        for shard in shards:
            if shard["max_token_id"] >= self.vocab_size:
                raise UserError(
                    f"corpus {path}: shard {shard['file']} holds token id {shard['max_token_id']}, outside of its "
                    f"tokenizer's vocabulary of {self.vocab_size}"
                )
            before = position
            position = self._map_shard(shard["file"], position)
            if position - before != shard["tokens"]:
                raise UserError(
                    f"corpus {path}: shard {shard['file']} holds {position - before} tokens, "
                    f"the manifest says {shard['tokens']}"
                )
        if position != self.num_tokens:
            raise UserError(f"corpus {path}: the shards hold {position} tokens, the manifest says {self.num_tokens}")

    def _map_shard(self, file: str, position: int) -> int:
        import pyarrow as pa

        try:
            batches = pa.ipc.open_stream(pa.memory_map(str(self.path / file))).read_all().to_batches()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"corpus {self.path}: shard {file} is not a readable Arrow file ({error})") from error
        for batch in batches:
            column = batch.column("tokens")
            self._values.append(column.values.to_numpy(zero_copy_only=True))
            self._offsets.append(column.offsets.to_numpy(zero_copy_only=True))
            self._starts.append(position)
            position += len(column.values)
        return position

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions `start` to `stop` of the stream: [stop - start], uint16 or uint32, not to be written to."""
        assert 0 <= start <= stop <= self.num_tokens
        batch = bisect_right(self._starts, start) - 1
        pieces = []
        while True:
            base = self._starts[batch]
            values = self._values[batch]
            pieces.append(values[max(start - base, 0) : stop - base])
            if stop <= base + len(values):
                break
            batch += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p, `start <= p < stop`, at which a document begins: int64, ascending."""
        assert 0 <= start <= stop <= self.num_tokens
        batch = bisect_right(self._starts, start) - 1
        pieces = []
        while True:
            base = self._starts[batch]
            offsets = self._offsets[batch]
            # int32 bounds: any other dtype would make numpy convert the whole array of offsets.
            bounds = np.array([max(start - base, 0), min(stop - base, int(offsets[-1]))], dtype=np.int32)
            first, last = np.searchsorted(offsets, bounds, side="left")
            pieces.append(offsets[first:last].astype(np.int64) + base)
            if stop <= base + len(self._values[batch]):
                break
            batch += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' checksums: the same for the same tokens in the same order."""
        sums = "".join(shard["sha256"] for shard in self.manifest["splits"][self.split]["shards"])
        return hashlib.sha256(sums.encode()).hexdigest()

    def __repr__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_tokens:,} tokens"
        return f"TokenCorpus({str(self.path)!r}, {self.split!r}, {size})"


def check_model_matches_corpora(
    vocab_size: int, tokenizer_fingerprint: str | None, corpora: Sequence[TokenCorpus]
) -> None:
    """Stop before training on ids that mean something else to the model.

    Args:
        vocab_size: rows of the model's embedding.
        tokenizer_fingerprint: of the tokenizer that the model was trained with so far; None for a new model.
        corpora: what it is to be trained on.

    Raises:
        UserError: a vocabulary exceeds the embedding, or the tokenizers differ from each other or from the model's.
    """
    for corpus in corpora:
        if corpus.vocab_size > vocab_size:
            raise UserError(
                f"corpus {corpus.path}: its tokenizer has a vocabulary of {corpus.vocab_size}, the model's embedding "
                f"only vocab_size={vocab_size}; set vocab_size to at least {corpus.vocab_size}"
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
            if corpus.tokenizer_fingerprint != tokenizer_fingerprint:
                raise UserError(
                    f"corpus {corpus.path}: made with another tokenizer than the model's (fingerprints "
                    f"{corpus.tokenizer_fingerprint[:12]}... and {tokenizer_fingerprint[:12]}...); "
                    "build it again with the model's tokenizer"
                )
