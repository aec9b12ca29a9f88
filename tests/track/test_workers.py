"""Test a grid over two devices, here two processes on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fork_server import CONTEXT

from lrnn.errors import UserError
from lrnn.track.cell import train_cell
from lrnn.track.interleave import interleave
from lrnn.track.workers import run_on_devices

CPU = torch.device("cpu")
S3 = {"p": {"task": "parity"}, "s3": {"task": "group_word", "group": "S3"}}


def test_two_processes_do_the_work_of_one(tiny_cells, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: CONTEXT)  # it starts faster than "spawn"
    lines = []
    cells = tiny_cells("two", tasks=S3)
    two = {str(cell): result for cell, result in run_on_devices(cells, [CPU, CPU], 2, lines.append)}
    assert set(two) == {str(cell) for cell in cells} and len(lines) == len(cells) * 5
    for cell, result in interleave(tiny_cells("one", tasks=S3), lambda c: train_cell(c, CPU, say=str), 1, CPU):
        other = two[str(cell)]
        assert result["by_length"] == other["by_length"] and result["accuracy"] == other["accuracy"]
    assert all((cell.folder / "result.json").is_file() for cell in cells)


@pytest.mark.parametrize("kind", ["bad input", "error"])
def test_the_error_of_a_process_is_raised_once_and_ends_all(tiny_cells, capfd, kind):
    cells = tiny_cells()
    bad = cells[1]
    bad.folder.mkdir(parents=True)
    if kind == "bad input":
        (bad.folder / "result.json").write_text(json.dumps({"fingerprint": "another"}))
        message = f"{bad.folder} holds parity, deltanet"
    else:
        (bad.folder / "result.json").write_text("no JSON")
        message = "on cpu: JSONDecodeError: Expecting value"
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        list(run_on_devices(cells, [CPU, CPU], 1, str))
    assert capfd.readouterr().err.count("Traceback") == (kind == "error")


SCRIPT = """
import sys, torch
from lrnn.track.grid import load_grid
from lrnn.track.workers import run_on_devices
if __name__ == "__main__":
    cpu = torch.device("cpu")
    for cell, result in run_on_devices(load_grid(sys.argv[1])[1], [cpu, cpu], 1, lambda text: print(text, flush=True)):
        pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_processes_too(tiny_cells, tmp_path, number):
    tiny_cells(train={"min_length": 3, "max_length": 10, "steps": 10**6, "batch_size": 8, "lr": 1e-2, "log_every": 10})
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "out.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        seen: set[str] = set()
        while len(seen) < 2:  # both train
            line = parent.stdout.readline()
            assert line, "it ended by itself"
            seen.add(line.split(":")[0])
        group = os.getpgid(parent.pid)
        if number == signal.SIGINT:
            os.killpg(group, number)  # as a terminal does
        else:
            parent.send_signal(number)
        assert parent.wait(30) != 0
        end = time.monotonic() + 30
        while alive := members(group):
            assert time.monotonic() < end, alive
            time.sleep(0.1)
    finally:
        if members(parent.pid):  # it leads the group
            os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def members(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
