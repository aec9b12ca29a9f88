"""Test the thread that makes batches ahead, and the time that a step waits for it."""

import threading
import time

import pytest

from lrnn.pretrain.data.prefetch import Prefetcher

pytestmark = pytest.mark.alone


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_prefetcher_runs_ahead_and_stops():
    made = []

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    before = prefetch_threads()
    with Prefetcher(items(), depth=3) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one is taken, three are in the queue, one waits to enter it
        start = time.monotonic()
    assert time.monotonic() - start < 2 and prefetch_threads() == before
    assert list(ahead) == []
    ahead.close()


def test_prefetcher_hands_over_errors_and_the_end():
    def items():
        yield 1
        yield 2
        raise KeyError("broken shard")

    ahead = Prefetcher(items(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="broken shard"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    assert list(Prefetcher(iter("abc"), depth=1)) == ["a", "b", "c"]


def test_prefetcher_counts_the_wait():
    def items():
        yield 0
        time.sleep(0.3)
        yield 1
        yield 2

    with Prefetcher(items(), depth=1) as ahead:
        next(ahead)
        ahead.take_wait_s()
        next(ahead)
        assert 0.2 < ahead.take_wait_s() < 5
        assert ahead.take_wait_s() == 0.0
        time.sleep(0.1)
        next(ahead)
        assert ahead.take_wait_s() < 0.1
