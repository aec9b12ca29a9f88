"""Cut the tokens of a call: sequences into chunks, and few long sequences into segments of whole chunks."""

import torch
from torch import Tensor

from lrnn.kernels.common.constants import CHUNK

SCANS_TO_FILL = 256  # scans that fill an H100: 132 multiprocessors with two programs each
SEGMENT = 16 * CHUNK  # the fewest tokens of a segment: with fewer, the extra pass costs more than it gains


def scan_columns(K: int, dtype: torch.dtype) -> int:
    """Return the columns of values that one program of a scan takes. 64 fill the rows of one warpgroup."""
    return 32 if dtype == torch.float32 and K == 256 else 64


def count_segments(batch_size: int, seq_len: int, num_heads: int, K: int, V: int, dtype: torch.dtype) -> int:
    """Return the number of equal segments that each sequence is cut into: 1, or a power of 2 from 4 on."""
    scans = batch_size * num_heads * (V // scan_columns(K, dtype))
    segments = 1
    while 2 * segments * scans <= SCANS_TO_FILL and seq_len % (2 * segments * SEGMENT) == 0:
        segments *= 2
    return segments if segments >= 4 else 1


def chunk_steps(factors: int) -> int:
    """Return the steps of a chunk of whole tokens: CHUNK if that is a multiple of the factors per token."""
    return CHUNK // factors * factors


def query_rows(factors: int) -> int:
    """Return the rows of a tile that holds the queries of a chunk: a power of 2 that products take."""
    return max(16, 1 << (CHUNK // factors - 1).bit_length())


def count_chunks(batch_size: int, seq_len: int, cu_seqlens: Tensor | None, steps: int = CHUNK) -> int:
    """Return the number of chunks of a batch. With documents it is an upper bound, which needs no data from the GPU."""
    if cu_seqlens is None:
        return batch_size * -(-seq_len // steps)
    return -(-batch_size * seq_len // steps) + cu_seqlens.shape[0] - 1


class Chunks:
    """The chunks of a batch: of B sequences of T steps, or of the documents that `cu_seqlens` bounds.

    No value is read back from the GPU: with documents, `count` is an upper bound and the table marks unused places.

    Attributes:
        sequences: number of sequences, or of documents.
        seq_len: steps per sequence, if there are no documents.
        count: number of chunks.
        starts: int32 [sequences], the number of each document's first chunk; None without documents.
        table: int32 [count, 2], the document of a chunk and the place of the chunk in it, or -1 where there is none;
            None without documents.
    """

    def __init__(self, batch_size: int, seq_len: int, cu_seqlens: Tensor | None, steps: int = CHUNK):
        self.seq_len = seq_len
        self.starts: Tensor | None = None
        self.table: Tensor | None = None
        self.count = count_chunks(batch_size, seq_len, cu_seqlens, steps)
        if cu_seqlens is None:
            self.sequences = batch_size
        else:
            self.sequences = cu_seqlens.numel() - 1
            ends = ((cu_seqlens.diff() + steps - 1) // steps).cumsum(0)
            number = torch.arange(self.count, device=cu_seqlens.device)
            document = torch.searchsorted(ends, number, right=True)
            starts = torch.cat([ends.new_zeros(1), ends])
            within = number - starts[document.clamp(max=self.sequences - 1)]
            self.starts = starts[:-1].int()
            self.table = torch.stack([torch.where(document < self.sequences, document, -1), within], 1).int()
