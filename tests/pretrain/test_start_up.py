"""Test the account of the time before the first step."""

import time

from lrnn.pretrain.metrics import start_up as module
from lrnn.pretrain.metrics.start_up import StartUp, process_age_s


def test_all_time_is_booked(monkeypatch):
    now = iter([100.0, 103.0, 104.5, 104.75])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    start_up = StartUp(age_s=20)
    for name in ("imports", "engine", "imports"):
        start_up.lap(name)
    assert start_up.seconds == {"imports": 23.25, "engine": 1.5}
    assert str(start_up) == "start-up took 24.8 s: imports 23.2, engine 1.5"


def test_the_age_of_the_process_counts_what_it_did_so_far():
    before = process_age_s()
    time.sleep(0.05)
    assert before >= time.process_time() - 0.1 and 0.04 < process_age_s() - before < 5
