"""Held-out loss by document, in windows as training sees them.

A document is its text behind the id that begins documents. It is cut into windows of the training length, in each of
which the model starts afresh, as in training. Every token of the text is predicted once; the end of the document is
not, because it has no bytes.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrnn import LrnnForCausalLM
from lrnn.errors import UserError
from lrnn.eval.documents import read_texts
from lrnn.eval.generation.prefill import CHUNK
from lrnn.threads import usable_cores
from lrnn.tokenizer import Tokenizer
from lrnn.traces.training import answer_spans

TEXTS = 64  # that a thread tokenises at a time
LOGITS = 2**27  # that exist at a time, in float32: 512 MB
REST, ANSWER = 0, 1  # groups of tokens


@dataclass(frozen=True)
class Text:
    """A tokenised document.

    Attributes:
        ids: int32 [n + 1], the first of which begins documents.
        groups: int8 [n], the group of each id but the first.
        n_bytes: bytes of the text in UTF-8.
    """

    ids: np.ndarray
    groups: np.ndarray
    n_bytes: int


def read_documents(path: Path, tokenizer: Tokenizer, limit: int, answers_by: Any = None) -> list[Text]:
    """Return a sample of the documents of a jsonl file: as many as have `limit` tokens or more.

    They are those with the smallest SHA-256 of their text, because neighbours in the file are alike.

    Args:
        path: rows `{"text": ...}`; empty texts are left out.
        tokenizer: of the model.
        limit: tokens.
        answers_by: for program traces, a `tokenizers.Tokenizer` with the same ids, which says where tokens are in the
            text. Tokens of answers are then of the group `ANSWER`.

    Raises:
        UserError: the file is missing, has a bad row, or fewer than two documents.
    """

    def read(texts: list[str]) -> list[Text]:
        if answers_by is not None:
            found = answers_by.encode_batch(texts, add_special_tokens=False)
            return [
                make(text, one.ids, mark_answers(text, one.offsets)) for text, one in zip(texts, found, strict=True)
            ]
        found = tokenizer.encode_batch(texts)
        return [make(text, ids, np.zeros(len(ids), np.int8)) for text, ids in zip(texts, found, strict=True)]

    def make(text: str, ids: list[int], groups: np.ndarray) -> Text:
        return Text(np.array([*tokenizer.document_prefix, *ids], np.int32), groups, len(text.encode("utf-8")))

    if not path.is_file():
        raise UserError(f"held-out file not found: {path}")
    documents: list[Text] = []
    tokens, cores = 0, usable_cores()
    batches = _batches(_in_order_of_hash(path))
    with ThreadPoolExecutor(cores) as threads:  # tokenizers compute without Python's lock
        while tokens < limit and (some := list(islice(batches, cores))):
            for text in (text for texts in threads.map(read, some) for text in texts):
                if tokens < limit:
                    documents.append(text)
                    tokens += len(text.groups)
    if len(documents) < 2:
        raise UserError(f"{path} holds {len(documents)} documents up to {limit:,} tokens; an error needs two or more")
    return documents


def _in_order_of_hash(path: Path) -> Iterator[str]:
    """Yield the texts of a file that are not empty. Only a hash and a place of each are in memory at once."""
    places = sorted((sha256(text.encode("utf-8")).digest(), at) for at, text in read_texts(path) if text)
    with path.open("rb") as file:
        for _, at in places:
            file.seek(at)
            yield json.loads(file.readline())["text"]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, TEXTS)):
        yield batch


def mark_answers(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return the group of each token of a document of traces, int8 [n].

    Args:
        offsets: the characters of each token, from start to before end.
    """
    spans = np.array(answer_spans(text)).reshape(-1, 2)
    starts, ends = np.array(offsets).reshape(-1, 2).T
    # The first span that ends behind the token's start; it overlaps if it starts before the token's end.
    nearest = np.searchsorted(spans[:, 1], starts, side="right")
    begins = np.append(spans[:, 0], len(text) + 1)[nearest]
    return np.where(begins < ends, ANSWER, REST).astype(np.int8)


@torch.no_grad()
def sum_losses(
    model: LrnnForCausalLM,
    documents: list[Text],
    seq_len: int,
    batch_tokens: int,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum negative log-likelihoods by document and group of tokens.

    Args:
        model: on its device, in eval mode.
        seq_len: tokens that are predicted in a window.
        batch_tokens: largest number of tokens that are read at once, padding included; at least one window.
        progress: called with the number of tokens that were read since the last call.

    Returns:
        The sums in nats, float64 [D, 2], and the numbers of tokens, int64 [D, 2].
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2 * len(documents), dtype=torch.float64, device=device)
    for batch in batches_of(documents, seq_len, batch_tokens):
        ids, rows, places = _stack(documents, batch, seq_len)
        given = torch.from_numpy(ids).to(device, torch.int64)
        hidden = model.model(input_ids=given[:, :-1], use_cache=False).last_hidden_state
        kept = torch.from_numpy(rows >= 0).to(device)
        nll = token_losses(model, hidden[kept], given[:, 1:][kept])
        sums.index_add_(0, torch.from_numpy(places).to(device), nll.double())
        progress(len(places))
    counts = np.array([np.bincount(document.groups, minlength=2) for document in documents])
    return sums.view(-1, 2).cpu().numpy(), counts


def batches_of(documents: list[Text], seq_len: int, batch_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of windows (document, first id), from long to short."""

    def length(window: tuple[int, int]) -> int:
        return min(len(documents[window[0]].groups) - window[1], seq_len)

    windows = [(i, start) for i, text in enumerate(documents) for start in range(0, len(text.groups), seq_len)]
    windows.sort(key=length, reverse=True)
    first = 0
    while first < len(windows):
        rows = max(1, batch_tokens // _padded(length(windows[first])))
        yield windows[first : first + rows]
        first += rows


def _padded(length: int) -> int:
    """Return the width of a batch. Kernels work in chunks, and are compiled for few shapes."""
    return -(-length // CHUNK) * CHUNK


def _stack(
    documents: list[Text], batch: list[tuple[int, int]], seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids of windows with padding on the right, int32 [B, T + 1], and where their losses belong.

    That is int64 [B, T], twice the document plus the group, or -1 at padding; and the same without padding, in order.
    """
    parts = [(i, documents[i].ids[start : start + seq_len + 1], documents[i].groups[start:]) for i, start in batch]
    width = _padded(max(len(ids) for _, ids, _ in parts) - 1)
    ids = np.zeros((len(parts), width + 1), np.int32)
    places = np.full((len(parts), width), -1, np.int64)
    for row, (i, part, groups) in enumerate(parts):
        ids[row, : len(part)] = part
        places[row, : len(part) - 1] = 2 * i + groups[: len(part) - 1]
    return ids, places, places[places >= 0]


def token_losses(model: LrnnForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return -log p, in nats, of labels int64 [N] after hidden states [N, hidden]: float32 [N].

    Logits are computed in float32: in bfloat16 they would be rounded to three digits.
    """
    weight = model.lm_head.weight.float()
    rows = max(1, LOGITS // len(weight))
    pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h.float(), weight), y, reduction="none") for h, y in pieces])
