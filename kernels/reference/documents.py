"""Documents packed into rows of tokens, in plain PyTorch.

`cu_seqlens`, int32 or int64 [N + 1], holds the boundaries of N documents in the flattened B * T tokens. The file
depends on torch alone: it is copied into exported model folders.
"""

import torch
from torch import Tensor


def document_ids(cu_seqlens: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Return the number of the document that each token belongs to: int64 [B, T], non-decreasing over the tokens."""
    first = torch.zeros(batch_size * seq_len + 1, dtype=torch.int64, device=cu_seqlens.device)
    # Empty documents share a boundary, so their marks add up. The last boundary is one past the last token.
    first.index_add_(0, cu_seqlens.long(), torch.ones_like(cu_seqlens, dtype=torch.int64))
    return first[:-1].cumsum(0).view(batch_size, seq_len)


def document_starts(document: Tensor, continued: bool = False) -> Tensor:
    """Return a bool tensor [B, T] that is True at the first token of each document and of each row.

    Args:
        document: int64 [B, T], as `document_ids` returns it.
        continued: whether there is a state ahead of each row, from which its first document continues. Then the first
            tokens of rows start nothing.
    """
    first = torch.full_like(document[:, :1], not continued, dtype=torch.bool)
    return torch.cat([first, document[:, 1:] != document[:, :-1]], 1)


def states_of_documents(state: Tensor | None, cu_seqlens: Tensor | None, document: Tensor | None) -> Tensor | None:
    """Return a state ahead of each of the N documents, [N, ...]: that of a row for its first one, zeros for the others.

    Args:
        state: [B, ...], or None, which is returned.
        cu_seqlens, document: the documents; None if every row is one, whose states are returned as they are.
    """
    if state is None or cu_seqlens is None or document is None:
        return state
    zeros = state.new_zeros(cu_seqlens.shape[0] - 1, *state.shape[1:])
    return zeros.index_copy(0, document[:, 0] - 1, state)  # documents are counted from 1


def states_of_rows(states: Tensor, document: Tensor | None) -> Tensor:
    """Return the state behind each row, [B, ...]: that behind its last document. `states` [N, ...] are of documents."""
    return states if document is None else states[document[:, -1] - 1]


def note_longest(cu_seqlens: Tensor, longest: int) -> None:
    """Note the length of the longest document on its boundaries, so that nothing has to read them from a GPU."""
    cu_seqlens.longest = longest  # type: ignore[attr-defined]


def longest_document(cu_seqlens: Tensor, seq_len: int) -> int:
    """Return the length of the longest document that was noted, or `seq_len`, that of a row, which bounds it."""
    return getattr(cu_seqlens, "longest", seq_len)
