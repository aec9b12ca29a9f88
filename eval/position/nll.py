"""Compute negative log-likelihoods of long documents, read piece by piece with the state passed on."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrnn.errors import UserError
from lrnn.eval.documents import Document, load_ids
from lrnn.eval.position.bins import bin_of
from lrnn.tokenizer import Tokenizer

ROWS = 1024  # tokens whose logits exist in float32 at a time


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p, in nats, of labels int64 [B, T] under logits [B, T, vocab]: float32 [B, T]."""
    pieces = zip(logits.flatten(0, 1).split(ROWS), labels.flatten().split(ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in pieces]).view(labels.shape)


@torch.no_grad()
def piecewise_nll(model: nn.Module, ids: Tensor, piece: int) -> Iterator[Tensor]:
    """Yield -log p of every id but the first, given all before it: pieces float32 [B, <= piece] on the model's device.

    The model reads `piece` tokens at a time, and passes its state on in `past_key_values`.

    Args:
        model: a causal language model of transformers.
        ids: int64 [B, T], on any device.
        piece: tokens per call.

    Raises:
        UserError: the model passes no state on.
    """
    device = next(model.parameters()).device
    carried = None
    for start in range(0, ids.shape[1] - 1, piece):
        part = ids[:, start : start + piece + 1].to(device)
        out = model(input_ids=part[:, :-1], past_key_values=carried, use_cache=True)
        carried = out.past_key_values
        if carried is None:
            raise UserError(f"{type(model).__name__} passes no state on (past_key_values), so it cannot read in pieces")
        yield token_nll(out.logits, part[:, 1:])


def sum_by_bin(
    model: nn.Module,
    path: Path,
    documents: list[Document],
    tokenizer: Tokenizer,
    edges: np.ndarray,
    *,
    piece: int,
    batch_size: int,
    progress: Callable[[int], Any],
) -> tuple[np.ndarray, np.ndarray]:
    """Sum negative log-likelihoods per document and bin.

    Args:
        model: a causal language model of transformers.
        path: the file that holds the documents.
        documents: D documents of that file.
        tokenizer: the model's tokenizer.
        edges: int64 [K + 1], from `log_edges`; the last is at least the length of the longest document.
        piece: tokens read at a time.
        batch_size: documents per batch.
        progress: called with the number of tokens read since the last call.

    Returns:
        The sums in nats, float64 [D, K], and the numbers of tokens, int64 [D, K].
    """
    bins = len(edges) - 1
    sums, counts = np.zeros((len(documents), bins)), np.zeros((len(documents), bins), dtype=np.int64)
    order = sorted(range(len(documents)), key=lambda i: -documents[i].length)  # keeps the padding in a batch small
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        loaded = [load_ids(path, documents[i], tokenizer) for i in batch]
        width = max(len(ids) for ids, _ in loaded)
        # Padding is on the right, where no token that counts can see it.
        ids = torch.tensor(np.stack([np.pad(ids, (0, width - len(ids))) for ids, _ in loaded]), dtype=torch.int64)
        read = 0
        for nll in piecewise_nll(model, ids, piece):
            values = nll.cpu().numpy()
            index = bin_of(np.arange(read + 1, read + 1 + values.shape[1]), edges)
            for row, (i, (_, predicted)) in enumerate(zip(batch, loaded, strict=True)):
                keep = np.flatnonzero(predicted[read : read + values.shape[1]])
                sums[i] += np.bincount(index[keep], weights=values[row, keep], minlength=bins)
                counts[i] += np.bincount(index[keep], minlength=bins)
                progress(min(max(len(predicted) - read, 0), values.shape[1]))
            read += values.shape[1]
    return sums, counts
