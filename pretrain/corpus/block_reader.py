"""Read a file in blocks, each of which is compared with its checksum every time it is read.

A file that changed, shrank or vanished since it was opened is so noticed where it is read, and named. It is read by
`pread`, not through a memory map: where a mapped file has shrunk, or its disk fails, the process dies of SIGBUS.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_64_digest

from lrnn.errors import UserError

BLOCK_BYTES = 1 << 16  # part of the format of a corpus
DIGEST_BYTES = 8
MAX_OPEN_FILES = 256  # of this process; a corpus may have thousands of shards, and 1,024 is the usual limit

ADVICE = (
    "copy the shard again from where the corpus is whole, or build the corpus again; "
    "then run the same command: a run goes on where it stands"
)


class CorruptData(UserError):
    """Data of a corpus that cannot be read as it was written: changed, cut off, vanished, or on a failing disk."""


class _Descriptor:
    """A file descriptor that is closed with the last reference to it, so never while a thread still reads from it."""

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # an argument: `os` is gone when Python exits
        close(self.fd)


# The files that hold a descriptor, the least recently read first. Weak references: what belongs to a corpus that nobody
# uses any more is closed.
_open_files: OrderedDict["weakref.ref[BlockFile]", None] = OrderedDict()
_open_files_lock = threading.Lock()


class BlockFile:
    """A file of known size and checksums. It is opened when it is read first; threads may share it.

    Args:
        path: of the file.
        label: what messages call it.
        size: its bytes.
        digests: xxh3-64 of each block of `BLOCK_BYTES` (the last one may be shorter), `DIGEST_BYTES` each.
    """

    def __init__(self, path: Path, label: str, size: int, digests: bytes):
        assert len(digests) == DIGEST_BYTES * -(-size // BLOCK_BYTES)
        self._path, self._label, self._size, self._digests = path, label, size, digests
        self._descriptor: _Descriptor | None = None
        self._reference = weakref.ref(self)

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop`, not to be written to: a view of the blocks that they lie in, which were all checked.

        Raises:
            CorruptData: a block differs from its checksum, the file is shorter, or it cannot be read.
        """
        assert 0 <= start <= stop <= self._size
        if start == stop:
            return memoryview(b"")
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        base = first * BLOCK_BYTES
        blocks = memoryview(self._read_raw(base, min((last + 1) * BLOCK_BYTES, self._size)))
        for block in range(first, last + 1):
            at = block * BLOCK_BYTES
            content = blocks[at - base : at - base + BLOCK_BYTES]
            found = xxh3_64_digest(content)
            expected = self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
            if found != expected:
                raise CorruptData(
                    f"{self._label} is corrupt in bytes {at} to {at + len(content)} (xxh3 {found.hex()}, it was "
                    f"{expected.hex()} when the corpus was built); {ADVICE}"
                )
        return blocks[start - base : stop - base]

    def _read_raw(self, start: int, stop: int) -> bytes:
        try:
            descriptor = self._open()
            data = os.pread(descriptor.fd, stop - start, start)
            while len(data) < stop - start:  # at its end, or a network file system gave less than was asked for
                more = os.pread(descriptor.fd, stop - start - len(data), start + len(data))
                if not more:
                    raise CorruptData(
                        f"{self._label} was cut off: bytes {start} to {stop} were to be read, it ends at byte "
                        f"{start + len(data)} of {self._size}; {ADVICE}"
                    )
                data += more
        except OSError as error:
            raise CorruptData(
                f"{self._label} cannot be read in bytes {start} to {stop} ({error.strerror}); {ADVICE}"
            ) from error
        return data

    def _open(self) -> _Descriptor:
        with _open_files_lock:
            if self._descriptor is not None:
                _open_files.move_to_end(self._reference)
                return self._descriptor
        descriptor = _Descriptor(os.open(self._path, os.O_RDONLY))  # without the lock: it may take long
        with _open_files_lock:
            self._descriptor = descriptor
            _open_files[self._reference] = None
            _open_files.move_to_end(self._reference)
            while len(_open_files) > MAX_OPEN_FILES:
                oldest = _open_files.popitem(last=False)[0]()
                if oldest is not None:
                    oldest._descriptor = None
        return descriptor
