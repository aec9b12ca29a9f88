"""Test a grid over two devices, here two processes on the CPU."""

import json
import os
import signal
import time

import grid_process
import pytest
import torch
from fork_server import CONTEXT
from process_table import members

from lrnn.track.cell import train_cell
from lrnn.track.interleave import interleave
from lrnn.track.workers import run_on_devices

CPU = torch.device("cpu")
# Packages are imported again by every process.
LONG = pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="takes long; LRNN_TORTURE=1 runs it")
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


@pytest.fixture
def start_grid(tmp_path):
    """`start_grid(start)` starts a process that trains the cells of `tiny_cells()`, and returns it and its output."""
    started = []

    def start(way: str = "fork"):
        output = tmp_path / "output"
        process = CONTEXT.Process(target=grid_process.run, args=(tmp_path / "out.yaml", output, way))
        process.start()
        started.append(process)
        return process, output

    yield start
    for process in started:
        if members(process.pid):  # it leads the group
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["bad input", "error"])
def test_the_error_of_a_process_is_raised_once_and_ends_all(tiny_cells, start_grid, kind):
    bad = tiny_cells()[1]
    bad.folder.mkdir(parents=True)
    if kind == "bad input":
        (bad.folder / "result.json").write_text(json.dumps({"fingerprint": "another"}))
        message = f"UserError: {bad.folder} holds parity, deltanet"
    else:
        (bad.folder / "result.json").write_text("no JSON")
        message = "UserError: on cpu: JSONDecodeError: Expecting value"
    process, output = start_grid()
    process.join(120)
    assert process.exitcode == 0 and not members(process.pid)
    text = output.read_text()
    assert text.count("UserError") == 1 and message in text
    assert text.count("Traceback") == (kind == "error")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", ["fork", pytest.param("spawn", marks=LONG)])
def test_a_signal_ends_the_processes_too(tiny_cells, start_grid, number, way):
    tiny_cells(train={"min_length": 3, "max_length": 10, "steps": 10**6, "batch_size": 8, "lr": 1e-2, "log_every": 10})
    process, output = start_grid(way)
    while not output.exists() or len({line.split(":")[0] for line in output.read_text().splitlines()}) < 2:
        assert process.is_alive(), "it ended by itself"  # before both train
        time.sleep(0.05)
    assert len(members(process.pid)) >= 3
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode not in (0, None)
    end = time.monotonic() + 30
    while alive := members(process.pid):
        assert time.monotonic() < end, alive
        time.sleep(0.1)
