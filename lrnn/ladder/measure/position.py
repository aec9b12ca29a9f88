"""Loss by position, far past the training length."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lrnn import LrnnForCausalLM
from lrnn.eval.documents import find_documents, join_documents
from lrnn.eval.position.bins import log_edges
from lrnn.eval.position.nll import sum_by_bin
from lrnn.ladder.measure.parts import Part
from lrnn.ladder.measure.settings import Position
from lrnn.tokenizer import Tokenizer

PER_OCTAVE = 1  # bins
PIECE = 2048  # tokens that are read at a time


def loss_by_position(
    settings: Position, model: LrnnForCausalLM, path: Path, tokenizer: Tokenizer, trained: int, batch_tokens: int
) -> Part:
    """Return a figure for each bin of positions on a logarithmic scale, of which the training length is an edge.

    Args:
        path: the documents of the domain.
        trained: training length in tokens.
        batch_tokens: largest number of tokens that are read at once; at least one piece.

    Raises:
        UserError: fewer than two documents are long enough.
    """
    longest = settings.times * trained
    if settings.join:
        documents = join_documents(path, tokenizer, longest, settings.documents)
    else:
        documents = find_documents(path, tokenizer, longest, longest, settings.documents)
    edges = log_edges(longest, trained, PER_OCTAVE)
    piece = min(PIECE, batch_tokens)
    total = sum(document.length for document in documents)
    with tqdm(total=total, unit="token", unit_scale=True, desc="loss by position") as bar, torch.no_grad():
        sums, counts = sum_by_bin(
            model,
            path,
            documents,
            tokenizer,
            edges,
            piece=piece,
            batch_size=max(1, batch_tokens // piece),
            progress=bar.update,
        )
    part = Part()
    for number, last in enumerate(edges[1:].tolist()):
        pairs = np.stack([-sums[:, number], counts[:, number]], axis=-1)
        part.add("position_nats", settings.domain, last, pairs[pairs[:, 1] > 0])
    return part
