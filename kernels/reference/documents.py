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


def document_starts(document: Tensor) -> Tensor:
    """Return a bool tensor [B, T] that is True at the first token of each document and of each row.

    Args:
        document: int64 [B, T], as `document_ids` returns it.
    """
    first = torch.ones_like(document[:, :1], dtype=torch.bool)
    return torch.cat([first, document[:, 1:] != document[:, :-1]], 1)


def note_longest(cu_seqlens: Tensor, longest: int) -> None:
    """Note the length of the longest document on its boundaries, so that nothing has to read them from a GPU."""
    cu_seqlens.longest = longest  # type: ignore[attr-defined]


def longest_document(cu_seqlens: Tensor, seq_len: int) -> int:
    """Return the length of the longest document that was noted, or `seq_len`, that of a row, which bounds it."""
    return getattr(cu_seqlens, "longest", seq_len)
