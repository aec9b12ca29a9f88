"""Test that of several processes one compiles a kernel, and the others read it, whatever happens meanwhile."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from lrnn import cli
from lrnn.errors import UserError
from lrnn.kernels.common import compile_once
from lrnn.kernels.common.compile_once import CompileOnce

FORK = multiprocessing.get_context("fork")
KEY = "ab" * 32


@triton.jit
def add_one(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) + 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, with the class that the command line sets."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_MANAGER", cli.COMPILE_ONCE)
    return tmp_path / "cache"


def in_processes(count, action):
    """Call `action(report)` in forks at the same moment. Return what they reported, and their exit codes."""
    barrier, reports = FORK.Barrier(count), FORK.SimpleQueue()

    def start():
        barrier.wait()
        action(reports.put)
        os._exit(0)

    processes = [FORK.Process(target=start) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = []
    while not reports.empty():
        found.append(reports.get())
    return found, [process.exitcode for process in processes]


def compile_slowly(report, name="kernel.json"):
    """Do what Triton does with its cache, and report when it compiled and what it got."""
    manager = get_cache_manager(KEY)
    if manager.get_group(name) is None:
        start = time.monotonic()
        time.sleep(0.3)
        path = manager.put(f"by {os.getpid()}", name)
        report(("compiled", start, time.monotonic()))
        manager.put_group(name, {name: path})
    report(("got", Path(manager.get_group(name)[name]).read_text()))


def test_one_process_compiles_and_the_others_wait():
    found, codes = in_processes(3, compile_slowly)
    assert codes == [0, 0, 0]
    assert len([x for x in found if x[0] == "compiled"]) == 1
    assert len({x[1] for x in found if x[0] == "got"}) == 1


def test_triton_compiles_a_kernel_once_on_all_processes():
    def compile_with_triton(report):
        heard = triton.knobs.compilation
        heard.listener = lambda *, cache_hit, **_: report(cache_hit)
        source = ASTSource(add_one, {"x": "*fp32", "n": "constexpr"}, {"n": 64})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))

    found, codes = in_processes(2, compile_with_triton)
    assert (sorted(found), codes) == ([False, True], [0, 0])


def test_different_kernels_are_compiled_at_the_same_time():
    numbers = iter(range(100))

    def compile_own(report):
        global KEY
        KEY = f"{os.getpid():064x}"
        compile_slowly(report, f"{next(numbers)}.json")

    found, _ = in_processes(2, compile_own)
    (_, start, end), (_, other_start, other_end) = (x for x in found if x[0] == "compiled")
    assert start < other_end and other_start < end


def test_a_process_that_is_killed_while_it_compiles_blocks_nobody():
    def die_or_compile(report):
        if get_cache_manager(KEY).get_group("kernel.json") is None:
            os.kill(os.getpid(), signal.SIGKILL)

    _, codes = in_processes(2, die_or_compile)  # each dies in turn
    assert codes == [-signal.SIGKILL] * 2
    found, codes = in_processes(1, compile_slowly)
    assert found[0][0] == "compiled" and codes == [0]


def test_a_kernel_that_cannot_be_compiled_blocks_nobody():
    def fail(report):
        try:
            assert get_cache_manager(KEY).get_group("kernel.json") is None
            raise RuntimeError("ptxas failed")
        except RuntimeError:
            report("failed")
        time.sleep(0.5)  # alive, as a process that tries another setting

    began = time.monotonic()
    found, codes = in_processes(3, fail)
    assert found == ["failed"] * 3 and codes == [0] * 3
    assert time.monotonic() - began < 10


def test_libraries_that_triton_builds_are_built_once():
    def build(report):
        manager = get_cache_manager(KEY)
        if manager.get_file("utils.so") is None:
            time.sleep(0.2)
            manager.put(b"built", "utils.so")
            report("built")

    assert in_processes(3, build)[0] == ["built"]


def test_reading_takes_no_lock(monkeypatch):
    manager = get_cache_manager(KEY)
    assert manager.get_file("a") is None
    manager.put("text", "a")
    monkeypatch.setattr(compile_once, "FileLock", None)
    path = get_cache_manager(KEY).get_file("a")
    assert path is not None and Path(path).read_text() == "text"


def test_a_file_system_without_locks_is_said_once(monkeypatch, capsys):
    compile_once._say_without_locks.cache_clear()

    def refuse(self, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(compile_once.FileLock, "acquire", refuse)
    for key in ("aa", "bb"):
        manager = CompileOnce(key)
        assert manager.get_group("k.json") is None
        manager.put_group("k.json", {})
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "TRITON_CACHE_DIR" in error and "Operation not supported" in error


def test_a_wait_ends(monkeypatch):
    monkeypatch.setattr(compile_once, "LONGEST_WAIT_S", 0.2)
    holder = CompileOnce(KEY)
    assert holder.get_group("k.json") is None
    assert CompileOnce(KEY).get_group("k.json") is None  # and may compile itself


def test_a_cache_that_cannot_be_written_is_one_message(cache):
    cache.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written \(.*cache.*\); set TRITON_CACHE_DIR"):
        get_cache_manager(KEY)
