"""Cut the sequences of a batch into chunks."""

import torch
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK


def count_chunks(batch_size: int, seq_len: int, cu_seqlens: Tensor | None) -> int:
    """Chunks of a batch; with documents an upper bound, which takes no look at the GPU."""
    if cu_seqlens is None:
        return batch_size * -(-seq_len // CHUNK)
    return -(-batch_size * seq_len // CHUNK) + cu_seqlens.shape[0] - 1


class Chunks:
    """The chunks of a batch: of B sequences of T tokens, or of the documents that `cu_seqlens` bounds.

    No value is read back from the GPU: with documents, `count` is an upper bound and the table marks unused places.
    """

    def __init__(self, batch_size: int, seq_len: int, cu_seqlens: Tensor | None):
        self.seq_len = seq_len
        self.starts: Tensor | None = None  # int32 [N], number of each document's first chunk
        self.table: Tensor | None = None  # int32 [count, 2], document and chunk in it, or -1
        self.count = count_chunks(batch_size, seq_len, cu_seqlens)
        if cu_seqlens is None:
            self.sequences = batch_size
        else:
            self.sequences = cu_seqlens.numel() - 1
            ends = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
            number = torch.arange(self.count, device=cu_seqlens.device)
            document = torch.searchsorted(ends, number, right=True)
            starts = torch.cat([ends.new_zeros(1), ends])
            within = number - starts[document.clamp(max=self.sequences - 1)]
            self.starts = starts[:-1].int()
            self.table = torch.stack([torch.where(document < self.sequences, document, -1), within], 1).int()
