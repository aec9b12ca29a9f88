"""A cache of compiled kernels in which no process compiles what another one is compiling.

Triton keeps compiled kernels in the folder `TRITON_CACHE_DIR`, by default `~/.triton/cache`, and looks there before it
compiles. The processes of a job reach each kernel at the same moment, so that all would look in vain and compile the
same. With this cache, the first one to look in vain holds a lock on the kernel's folder until it has written the
kernel. The others wait for the lock and read the kernel. What is in the cache is read without a lock.

The lock is a file in the cache: it works among processes on a node, and among nodes that share the cache, however they
were started. The operating system frees it if its holder dies. Triton uses the class because the `lrnn` command sets
`TRITON_CACHE_MANAGER` to its name.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from filelock import FileLock, Timeout
from triton.runtime.cache import FileCacheManager

from lrnn.errors import UserError

LONGEST_WAIT_S = 300.0  # several times what the slowest kernel takes; after it, a process compiles without the lock


class CompileOnce(FileCacheManager):
    """The entry of one kernel, or of another file that Triton builds, in the cache.

    Triton calls `get_group` or `get_file` and, if the result is None, compiles and calls `put_group` or `put` with the
    same name. If it does not get so far, the lock is freed with this object.

    Raises:
        UserError: the folder of the cache cannot be written.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False):
        self._lock: FileLock | None = None  # held while this process compiles
        self._missing = ""  # the file that frees the lock when it is written
        self._shared = not (override or dump)
        try:
            super().__init__(key, override=override, dump=dump)
        except OSError as error:
            raise _not_writable(error) from None

    def get_file(self, filename: str) -> str | None:
        return self._find(filename, lambda: super(CompileOnce, self).get_file(filename))

    def get_group(self, filename: str) -> dict[str, str] | None:
        return self._find(f"__grp__{filename}", lambda: super(CompileOnce, self).get_group(filename))

    def put(self, data: Any, filename: str, binary: bool = True) -> str:  # put_group calls it too
        try:
            path = super().put(data, filename, binary)
        except OSError as error:
            raise _not_writable(error) from None
        if self._lock is not None and filename == self._missing:
            self._lock.release()
            self._lock = None
        return path

    def _find(self, filename: str, read: Callable[[], Any]) -> Any:
        """Return what `read` finds. If that is None, lock and read again, and stay locked if it is still None."""
        found = read()
        if found is not None or self._lock is not None or not self._shared:
            return found
        lock = FileLock(self.lock_path)
        try:
            lock.acquire(timeout=LONGEST_WAIT_S)
        except Timeout:
            return read()
        except (OSError, NotImplementedError) as error:  # some network file systems have no locks
            _say_without_locks(f"{type(error).__name__}: {error}")
            return None
        found = read()
        if found is not None:
            lock.release()
        else:
            self._lock, self._missing = lock, filename
        return found


@functools.cache  # once per process
def _say_without_locks(reason: str) -> None:
    print(
        f"lrnn: files in TRITON_CACHE_DIR cannot be locked ({reason}); each process compiles all kernels, which "
        "a folder on the node's own disk avoids",
        file=sys.stderr,
    )


def _not_writable(error: OSError) -> UserError:
    return UserError(
        f"the cache of compiled kernels cannot be written ({error.strerror}: {error.filename}); set TRITON_CACHE_DIR "
        "to a folder that can"
    )
