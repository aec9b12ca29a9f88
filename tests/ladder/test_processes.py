"""Test the processes that a ladder starts: their output, and that they end with the process that started them."""

import os
import signal
import time
from pathlib import Path

from lrnn.cli import main
from lrnn.ladder import processes
from lrnn.pretrain import command
from lrnn.pretrain.launch import LAUNCHER


def test_output_is_appended(tmp_path):
    log = tmp_path / "new/log.txt"
    for _ in range(2):
        assert processes.start(["--version"], log).wait() == 0
    first, second = log.read_text().splitlines()
    assert first == second and first.startswith("lrnn ")


def test_a_process_has_a_session_and_knows_its_parent(tmp_path, monkeypatch):
    """So Ctrl-C at the terminal does not reach it, and it can tell that its parent is gone."""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho ${LAUNCHER} $A; exec sleep 60")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    process = processes.start([], tmp_path / "log.txt", A="b")
    deadline = time.monotonic() + 30
    while not Path("log.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Path("log.txt").read_text() == f"{os.getpid()} b\n"
    assert os.getsid(process.pid) == process.pid
    process.terminate()
    assert process.wait() == -signal.SIGTERM


def test_a_run_of_several_processes_ends_with_the_ladder(monkeypatch):
    """The process that starts the others of a run watches its parent, as they watch it."""
    calls = []
    monkeypatch.setattr(command, "end_with_launcher", lambda: calls.append("watches"))
    monkeypatch.setattr(command, "launch", lambda count, words: calls.append(count) or 0)
    assert main(["pretrain", "tiny", "--nproc", "2"]) == 0
    assert calls == ["watches", 2]
