"""Read a file in blocks, and compare each block with its checksum every time it is read.

A file that changed, shrank or vanished after it was opened is therefore noticed, and named, when it is read. It is read
by `pread`, not through a memory map: if a mapped file has shrunk or its disk fails, the process dies of SIGBUS.
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
MAX_OPEN_FILES = 256  # per process; a corpus may have thousands of shards, and the usual limit is 1,024

ADVICE = (
    "copy the shard again from where the corpus is whole, or build the corpus again; "
    "then run the same command: a run resumes where it stopped"
)


class CorruptData(UserError):
    """Data of a corpus cannot be read as it was written: it changed, was cut off, vanished, or its disk fails."""


class _Descriptor:
    """A file descriptor that is closed with its last reference, and so never while a thread still reads from it."""

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound early: `os` is gone at exit
        close(self.fd)


# These files hold a descriptor, the least recently read first. The references are weak, so the files of a corpus that
# is no longer used are closed.
_open_files: OrderedDict["weakref.ref[BlockFile]", None] = OrderedDict()
_open_files_lock = threading.Lock()


class BlockFile:
    """A file of known size and checksums. It is opened by the first read; threads may share it.

    Args:
        path: path of the file.
        label: its name in messages.
        size: its size in bytes.
        digests: xxh3-64 of each block of `BLOCK_BYTES` (the last one may be shorter), `DIGEST_BYTES` each.
    """

    def __init__(self, path: Path, label: str, size: int, digests: bytes):
        assert len(digests) == DIGEST_BYTES * -(-size // BLOCK_BYTES)
        self._path, self._label, self._size, self._digests = path, label, size, digests
        self._descriptor: _Descriptor | None = None
        self._reference = weakref.ref(self)

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes `start` to `stop`, read-only. All blocks that they are in are checked.

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
            while len(data) < stop - start:  # The file ends, or a network file system returned less.
                more = os.pread(descriptor.fd, stop - start - len(data), start + len(data))
                if not more:
                    raise CorruptData(
                        f"{self._label} was cut off: reading bytes {start} to {stop}, it ends at byte "
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
        descriptor = _Descriptor(os.open(self._path, os.O_RDONLY))  # without the lock, because it may take long
        with _open_files_lock:
            self._descriptor = descriptor
            _open_files[self._reference] = None
            _open_files.move_to_end(self._reference)
            while len(_open_files) > MAX_OPEN_FILES:
                oldest = _open_files.popitem(last=False)[0]()
                if oldest is not None:
                    oldest._descriptor = None
        return descriptor
