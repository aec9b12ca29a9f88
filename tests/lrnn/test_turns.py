"""Test that a test that runs alone waits for all others, and they for it."""

import threading
import time
from itertools import pairwise

from turns import turn


def test_nothing_runs_beside_one_that_is_alone(tmp_path):
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def run(alone: bool) -> None:
        for _ in range(3):
            with turn(tmp_path, alone):
                start = time.monotonic()
                time.sleep(0.02)
                times[alone].append((start, time.monotonic()))

    threads = [threading.Thread(target=run, args=(alone,)) for alone in (False, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(of_kind) for of_kind in times.values()] == [3, 9]
    for start, end in times[True]:
        others = [x for of_kind in times.values() for x in of_kind if x != (start, end)]
        assert all(x_end <= start or end <= x_start for x_start, x_end in others)
    shared = sorted(times[False])
    assert any(later < end for (_, end), (later, _) in pairwise(shared)), "they take turns as well"
