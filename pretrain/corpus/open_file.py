"""Open a file for reading: on disk or at a URL, decompressed if its first bytes say that it is compressed."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

BUFFER_BYTES = 1 << 20


def _decompressed_by_arrow(codec: str) -> Callable[[Any], Any]:
    """Return an opener that reads with pyarrow, which reads every frame of a file and notices a missing end."""

    def open_stream(raw: Any) -> Any:
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), codec), BUFFER_BYTES)

    return open_stream


# First bytes of a compressed file -> opener.
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\x28\xb5\x2f\xfd": _decompressed_by_arrow("zstd"),
    b"\x50\x2a\x4d\x18": _decompressed_by_arrow("zstd"),  # a frame that zstd skips, which pzstd writes first
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x04\x22\x4d\x18": _decompressed_by_arrow("lz4"),
}
SUFFIXES = frozenset({".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4"})


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL such as https://... or hf://..."""
    return "://" in path


def open_raw(path: str) -> Any:
    """Open a file as it is, for reading bytes. Connections that fail are tried again."""
    if not is_remote(path):
        return open(path, "rb", buffering=BUFFER_BYTES)
    from datasets.utils.file_utils import xopen

    try:
        return io.BufferedReader(xopen(path, "rb"), BUFFER_BYTES)
    except Exception as error:  # Each protocol has errors of its own.
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, decompressed. The stream has `peek` and `readline`.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError: also later, from the stream, if the file cannot be read on.
    """
    with open_raw(path) as raw:
        head = raw.peek(8)
        for magic, decompressed in COMPRESSIONS.items():
            if head.startswith(magic):
                with decompressed(raw) as stream:
                    yield stream
                return
        yield raw


def is_compressed(path: str) -> bool:
    """Return whether the first bytes of a file are those of a compressed one."""
    with open_raw(path) as raw:
        return raw.peek(8).startswith(tuple(COMPRESSIONS))
