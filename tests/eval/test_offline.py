"""Test the preparation of a process for an evaluation."""

import subprocess
import sys

BARS = """
import time
from lrnn.eval import offline
offline.SECONDS = 0.2
offline.plain_progress()
from tqdm.auto import tqdm

def wait(seconds, n=1):
    for _ in range(n):
        time.sleep(seconds)
        yield

for _ in tqdm(wait(0.25, 2), desc="slow", total=2): pass
for _ in tqdm(wait(0.03, 10), desc="many", total=10): pass
for _ in tqdm(wait(0), desc="fast", total=1): pass
with tqdm(desc="unknown") as bar:
    for step in range(2):
        time.sleep(0.25)
        bar.update(3)
        bar.set_postfix(step=step)
for _ in tqdm(wait(0.25), desc="outer", total=1):
    for _ in tqdm(wait(0.25), desc="inner", total=1, leave=False): pass
for _ in tqdm(wait(0.15, 3), desc="ends", total=4): pass
"""


def test_bars_in_a_log_are_lines_and_none_is_there_twice():
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True, check=True)
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    lines = [line.partition(" [")[0] for line in done.stderr.split("\n")]
    assert len(lines) == len(set(lines)), lines
    expected = ["slow: 1/2", "slow: 2/2", "many: 10/10", "unknown: 3/?", "unknown: 6/?", "inner: 1/1", "outer: 1/1"]
    assert [line for line in lines if line in expected] == expected
    assert lines[-2:] == ["ends: 3/4", ""] and not any("fast" in line for line in lines)
