"""Find long documents in a jsonl file in one pass, and read their tokens again when needed.

Only a few numbers per document stay in memory, not its tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrnn.errors import UserError
from lrnn.pretrain.corpus.rows import BadRow, check_text
from lrnn.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """Where a document is in its file.

    Attributes:
        offsets: the bytes at which its lines start; more than one if documents were joined.
        length: the number of tokens that a model predicts in it: all but the first, which has no context.
    """

    offsets: tuple[int, ...]
    length: int


def read_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (byte at which the line starts, "text") of every line. Raise UserError, with its number, for a bad line."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            yield offset, _text(line, f"{path}, line {number}")
            offset += len(line)


def _text(line: bytes, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: expected a JSON object with "text", got {line[:80]!r}') from error
    if not isinstance(text, str):
        raise UserError(f'{where}: "text" must be a string, got {type(text).__name__}')
    return usable(text, where)


def usable(text: str, where: str) -> str:
    """Return a text. Raise UserError if no corpus would take it, such as for half a surrogate pair."""
    found = check_text(text)
    if isinstance(found, BadRow):
        raise UserError(f"{where}: {found.message}")
    return found


def document_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a document as a corpus stores it, from bos to eos."""
    return [*tokenizer.document_prefix, *tokenizer.encode_batch([text])[0], *tokenizer.document_suffix]


def find_documents(
    path: Path, tokenizer: Tokenizer, min_length: int, max_length: int, limit: int | None = None
) -> list[Document]:
    """Return the first `limit` documents of at least `min_length` tokens, in the file's order, cut at `max_length`.

    Raises:
        UserError: the file is missing or has a bad line, or fewer than two documents are long enough.
    """
    found = []
    for offset, text in _texts(path):
        # A token has a byte or more, so that a short text need not be tokenised. Tokenizers may put a space in front.
        if len(text.encode("utf-8")) + 1 + len(tokenizer.document_suffix) < min_length:
            continue
        length = len(document_ids(text, tokenizer)) - 1
        if length >= min_length:
            found.append(Document((offset,), min(length, max_length)))
        if len(found) == limit:
            break
    if len(found) < 2:
        lengths = [len(document_ids(text, tokenizer)) - 1 for _, text in _texts(path)]
        longest = ", ".join(f"{n:,}" for n in sorted(lengths, reverse=True)[:3])
        raise UserError(
            f"{path}: {len(found)} of {len(lengths):,} documents have at least {min_length:,} tokens, and a band over "
            f"documents needs two or more; the longest have {longest}. Give a smaller --max-length or --min-tokens, "
            "longer documents, or --join to join them"
        )
    return found


def join_documents(path: Path, tokenizer: Tokenizer, max_length: int, limit: int | None = None) -> list[Document]:
    """Join documents in the file's order until they have `max_length` tokens; every joined one begins with a document.

    Raises:
        UserError: the file is missing or has a bad line, or the text is too short for two.
    """
    found = []
    offsets: list[int] = []
    total = tokens = 0
    for offset, text in _texts(path):
        offsets.append(offset)
        added = len(document_ids(text, tokenizer))
        total, tokens = total + added, tokens + added
        if tokens > max_length:
            found.append(Document(tuple(offsets), max_length))
            offsets, tokens = [], 0
        if len(found) == limit:
            break
    if len(found) < 2:
        raise UserError(
            f"{path}: its documents, {total:,} tokens in all, do not join into two of {max_length:,} tokens, and a "
            "band over documents needs two or more; give a smaller --max-length or more text"
        )
    return found


def load_ids(path: Path, document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids int32 [length + 1] of a document, and bool [length]: whether the following id is to be predicted.

    At the seams of joined documents it is not: in training, too, no label crosses a document boundary.
    """
    parts = []
    with path.open("rb") as file:
        for offset in document.offsets:
            file.seek(offset)
            parts.append(np.array(document_ids(_text(file.readline(), str(path)), tokenizer), dtype=np.int32))
    ids = np.concatenate(parts)[: document.length + 1]
    predicted = np.ones(len(ids), dtype=bool)
    seams = np.cumsum([0, *map(len, parts)])
    predicted[seams[seams < len(ids)]] = False
    return ids, predicted[1:]


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise UserError(f"document file not found: {path}")
    return ((offset, text) for offset, text in read_texts(path) if text)
