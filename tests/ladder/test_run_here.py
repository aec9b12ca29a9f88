"""Test how cells are put on devices, started, stopped and shown, with shell programs in place of the cells."""

import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.ladder import processes, run_here
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.devices import Devices, visible_devices
from lrnn.ladder.progress import Progress, last_step
from lrnn.ladder.time_limit import TimeLimit
from lrnn.pretrain.metrics.flops import train_flops_per_token
from lrnn.run_lock import RunLock


@pytest.fixture
def cells(write):
    """Six cells, of which two share a GPU: seeds 0 and 1 of an arm in both ranges and of one without."""
    return load_ladder(write())[1]


@pytest.fixture
def run(monkeypatch, tmp_path, cells):
    """`run(devices, program, programs, limit)` runs the cells, and returns the status and the lines for the user.

    `programs` are those of single cells, by name.
    """
    monkeypatch.setattr(run_here, "POLL_S", 0.01)

    def run(
        devices: list[str], program: str, programs: dict[str, str] | None = None, limit: Any = None
    ) -> tuple[int, list[str]]:
        def start(arguments: list[str], log: Path, **variables: str) -> subprocess.Popen:
            assert arguments[:3] == ["ladder", "ladder.yaml", "--cell"]
            log.parent.mkdir(parents=True)
            command = ["sh", "-c", (programs or {}).get(arguments[3], program)]
            with log.open("ab") as file:
                return subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | variables, cwd=tmp_path)

        monkeypatch.setattr(processes, "start", start)
        lines: list[str] = []
        limit = limit or TimeLimit(None, cells)
        return run_here.run_cells(cells, Path("ladder.yaml"), Devices(devices), limit, lines.append), lines

    return run


def test_cells_start_in_order_and_share_gpus(run, cells, tmp_path):
    """Never more than two of them are on a GPU, and each sees its GPU alone."""
    program = 'echo "+ $CUDA_VISIBLE_DEVICES" >> events; sleep 0.3; echo "- $CUDA_VISIBLE_DEVICES" >> events'
    status, lines = run(["4", "7"], program)
    assert status == 0
    assert [line.split()[1] for line in lines if line.startswith("started")] == [cell.name for cell in cells]
    count = {"4": 0, "7": 0}
    most = dict(count)
    for line in (tmp_path / "events").read_text().splitlines():
        sign, device = line.split()
        count[device] += 1 if sign == "+" else -1
        most[device] = max(most[device], count[device])
    assert most == {"4": 2, "7": 2} and count == {"4": 0, "7": 0}


def test_a_failing_cell_does_not_stop_the_others(run, cells):
    status, lines = run(["cpu"], "true", {cells[1].name: "echo first; echo the reason; exit 2"})
    assert status == 1
    finished = {line.split()[1] for line in lines if line.startswith("finished")}
    assert finished == {cell.name for cell in cells} - {cells[1].name}
    assert f"{cells[1]} failed with status 2" in "\n".join(lines)
    assert lines[-1].startswith(f"\nfailed: {cells[1]}, ") and lines[-1].endswith("    first\n    the reason")


def test_a_cell_that_is_killed_has_failed(run, cells):
    status, lines = run(["cpu"], "true", {cells[0].name: "kill -9 $$"})
    assert status == 1 and f"{cells[0]} was killed by signal 9" in "\n".join(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_running_cells_and_starts_no_other(run, cells, tmp_path, number):
    def stop() -> None:
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    program = "trap 'touch saved-$$; exit 75' TERM; touch begun-$$; while :; do sleep 0.05; done"
    status, lines = run(["0"], program)
    thread.join()
    assert status == 75 and f"{number.name}: 2 running cells write their checkpoints and stop" in lines
    assert len(list(tmp_path.glob("saved-*"))) == len(list(tmp_path.glob("begun-*"))) == 2
    assert sum(line.startswith("stopped") for line in lines) == 2


def test_a_cell_that_was_stopped_by_itself_is_left_for_the_next_time(run, cells):
    assert run(["cpu"], "true", {cells[2].name: "exit 75"})[0] == 75


def test_cells_stop_when_the_time_is_over(run, cells):
    status, lines = run(["0"], "sleep 600", limit=TimeLimit(1 / 60, cells))
    assert status == 75 and "the time is over: 2 running cells write their checkpoints and stop" in lines
    assert sum(line.startswith("stopped") for line in lines) == 2


class NoTimeAfterTheFirst:
    """A limit that allows cells until one has ended."""

    is_over, is_tight = False, False

    def allows(self, cell) -> bool:
        return not self.is_tight

    def note(self, cell, seconds: float) -> None:
        self.is_tight = True


def test_a_cell_that_would_not_end_in_time_does_not_start(run):
    status, lines = run(["0"], "sleep 0.1", limit=NoTimeAfterTheFirst())
    assert status == 75 and lines[-1] == "4 cells would not end in the time that is left"
    assert [line.split()[0] for line in lines[:-1]] == ["started", "started", "finished", "finished"]


def test_the_time_that_cells_take(write, written, monkeypatch):
    """It is proportional to the work of training, by cells of the same size if any has ended."""
    now = [0.0]
    monkeypatch.setattr("lrnn.ladder.time_limit.time.monotonic", lambda: now[0])
    written["grids"] = [{"sizes": ["small", "large"], "arms": ["attention"], "seeds": [0, 1]}]
    small, short, long, *_ = load_ladder(write())[1]
    write_steps(long, long.steps // 2)
    limit = TimeLimit(1.0, [small, short, long])
    assert limit.allows(long) and not limit.is_over
    limit.note(small, 10.0)
    per_token = [train_flops_per_token(cell.model) for cell in (small, short)]
    seconds = 10.0 * short.tokens / small.tokens * per_token[1] / per_token[0]
    for left, cell in (
        (seconds, short),
        (seconds * long.tokens / short.tokens * (1 - (long.steps // 2) / long.steps), long),
    ):
        now[0] = 60.0 - left * 1.01
        assert limit.allows(cell)
        now[0] = 60.0 - left * 0.99
        assert not limit.allows(cell)
    now[0] = 30.0
    limit.note(long, 500.0)  # says nothing, because it was begun before
    assert limit.allows(short)
    limit.note(short, 31.0)
    assert not limit.allows(short) and limit.allows(small)
    now[0] = 60.0
    assert limit.is_over and not TimeLimit(None, [small]).is_over


def test_devices(cells, monkeypatch):
    """A run on two GPUs waits for both; one that shares waits for a GPU without one that does not."""
    devices = Devices(["a", "b"])
    shares, alone = cells[0], replace(cells[1], at_once=1)
    both = replace(cells[2], at_once=1, gpus=2)
    assert devices.place(shares) == ("a",)
    devices.add(shares, ["a"])
    assert devices.place(cells[3]) == ("b",) and devices.place(alone) == ("b",) and devices.place(both) == ()
    devices.add(alone, ["b"])
    assert devices.place(cells[3]) == ("a",) and devices.place(alone) == ()
    devices.add(cells[3], ["a"])
    assert devices.place(cells[4]) == ()
    for cell in (shares, alone, cells[3]):
        devices.remove(cell)
    assert devices.place(both) == ("a", "b")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lrnn.ladder.devices.usable_cores", lambda: 16)
    assert devices.variables(both, ["a", "b"]) == {"CUDA_VISIBLE_DEVICES": "a,b", "OMP_NUM_THREADS": "8"}
    assert devices.variables(shares, ["b"]) == {"CUDA_VISIBLE_DEVICES": "b", "OMP_NUM_THREADS": "4"}
    assert Devices(["cpu"]).variables(shares, ["cpu"]) == {"OMP_NUM_THREADS": "8"}
    Devices(["cpu"]).check([both])  # the CPU takes any cell
    with pytest.raises(UserError, match=r"takes 2 GPUs, and 1 can be seen; set sizes\.small\.gpus=1"):
        Devices(["a"]).check([both])


def test_visible_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8a,5")
    assert visible_devices() == ["3", "GPU-8a"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert visible_devices() == ["cpu"]


def write_steps(cell, steps: int) -> None:
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, steps + 1)]
    (cell.run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9']))


def test_progress(cells, monkeypatch):
    """The time that is left follows from the work that was done since the start, not from what was there before."""
    now = [100.0]
    monkeypatch.setattr("lrnn.ladder.progress.time.monotonic", lambda: now[0])
    write_steps(cells[0], 10)
    assert last_step(cells[0].run_dir) == 10 and last_step(cells[1].run_dir) == 0
    progress = Progress(cells[:2])
    assert progress.line([], [], cells[:1]) == f"0 done, 1 running, 1 left; {cells[0]} 10/40"
    write_steps(cells[0], 20)
    now[0] += 60.0  # for a quarter of a cell, and a half and a whole one are left
    assert "; about 6 min to go, until " in progress.line([], [], cells[:1])
    assert progress.line([cells[0]], [cells[1]], []).startswith("1 done, 0 running, 0 left, 1 failed; about 0 min")


def test_two_commands_of_a_ladder(write, tmp_path, capsys, monkeypatch):
    """The second is refused, while the first runs."""
    monkeypatch.setattr("lrnn.run_lock.WAIT_S", 0.0)
    monkeypatch.setattr("lrnn.ladder.cells.Cell.corpora", lambda cell, if_here=False: {})
    path = write()
    with RunLock(tmp_path / "out", "out"):
        assert main(["ladder", str(path)]) == 2
    assert f"out {tmp_path / 'out'} is in use by process {os.getpid()}" in capsys.readouterr().err


def test_what_is_missing_is_found_before_anything_runs(write, written, tmp_path, capsys):
    path = write()
    for arguments, message in (
        ([], "/code: no manifest.json"),
        (["--cells", "large/*"], "--cells large/* matches none of the 6 cells, the first of which is small/delta/neg"),
        (["--cell", "small/delta/negative/5K/seed-7"], "did you mean small/delta/negative/5K/seed-1?"),
        (["--time", "1:00:00"], "--time is for SLURM; add --submit"),
        (["--submit", "--report"], "leave out --report"),
        (["--report", "--cells", "*"], "--cells chooses among the cells that are left"),
        (["--minutes", "0"], "--minutes 0 should be a positive number"),
        (["--minutes", "5", "--submit"], "--minutes is for cells that run here"),
        (["--report", "--redo"], "--redo runs cells again"),
        (["--report"], None),
    ):
        assert main(["ladder", str(path), *arguments]) == 2
        output = capsys.readouterr()
        assert message is None or message in output.err, arguments
    assert "holds no result of this ladder's 6 cells" in output.out
    assert not (tmp_path / "out").exists()
