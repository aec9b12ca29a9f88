"""The table beside a shard: a checksum of each block, and the positions of the record batches in the file.

`SHARD.table` of a shard with n blocks of `BLOCK_BYTES` and m record batches is n digests of 8 bytes (xxh3-64,
big-endian, as xxhash prints it), then m rows of 4 int64 (little-endian), see `batch_layout`. The manifest holds the
sha256 of the table, and the table the checksum of every block. Because the table holds the layout, a reader need not
trust the headers inside a shard, nor open a shard before it reads from it.
"""

from pathlib import Path

import numpy as np
from xxhash import xxh3_64

from lrnn.pretrain.corpus.block_reader import BLOCK_BYTES, DIGEST_BYTES

SUFFIX = ".table"
_ROW = np.dtype(("<i8", 4))


class BlockDigests:
    """Compute the checksums of a file's blocks while its bytes are written."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._block = xxh3_64()
        self._room = BLOCK_BYTES  # bytes until the block is full

    def update(self, data: memoryview) -> None:
        """Add the next bytes of the file."""
        while data:
            taken = data[: self._room]
            self._block.update(taken)
            self._room -= len(taken)
            data = data[len(taken) :]
            if self._room == 0:
                self._done.append(self._block.digest())
                self._block.reset()
                self._room = BLOCK_BYTES

    def digests(self) -> bytes:
        """Return the digests of all blocks, concatenated, including the last and shorter one."""
        last = [self._block.digest()] if self._room < BLOCK_BYTES else []
        return b"".join(self._done + last)


def batch_layout(path: Path) -> np.ndarray:
    """Return the positions of the record batches in an Arrow stream file of `tokens` lists.

    Returns:
        int64 [batches, 4]; a row is (byte at which the int32 offsets begin, number of documents, byte at which the ids
        begin, number of ids).
    """
    import pyarrow as pa

    rows = []
    with pa.memory_map(str(path)) as file:
        base = file.read_buffer(1).address
        file.seek(0)
        for batch in pa.ipc.open_stream(file):
            column = batch.column("tokens")
            _, offsets, _, values = column.buffers()
            assert column.offset == 0 and column.null_count == 0
            rows.append((offsets.address - base, len(column), values.address - base, len(column.values)))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def pack_table(digests: bytes, layout: np.ndarray) -> bytes:
    """Return the content of a table, from `BlockDigests.digests` and `batch_layout`."""
    return digests + layout.astype("<i8").tobytes()


def unpack_table(table: bytes, size: int) -> tuple[bytes, np.ndarray]:
    """Return the digests and the layout in the table of a shard of `size` bytes: the inverse of `pack_table`."""
    end = DIGEST_BYTES * -(-size // BLOCK_BYTES)
    return table[:end], np.frombuffer(table, dtype=_ROW, offset=end)
