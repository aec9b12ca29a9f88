"""Storage that fails under a running training, and a second run on one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_disk import mounted
from training_group import losses, run_group

from lrnn.errors import UserError
from lrnn.pretrain import checkpoint
from lrnn.pretrain.metrics import read_metrics
from lrnn.pretrain.run_lock import RunLock


def events(run_dir: Path, name: str) -> list[dict]:
    return [r for r in read_metrics(run_dir) if r.get("event") == name]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while(base, tmp_path):
    """The run goes on, its records wait in memory, and the checkpoint is made up for when there is room."""
    with mounted(tmp_path / "disk", "16m") as disk:
        settings = {"steps": 12, "checkpoint": {"every": 4, "keep_last": 2}}
        straight = base("straight", **settings)
        filled = base(**settings) | {"run_dir": str(disk / "run")}
        (disk / "run").mkdir()
        specs = [{"config": straight}, {"config": filled, "fill_at": 4, "free_at": 7}]
        assert run_group(tmp_path, specs) == [0, 0]
        assert losses(filled) == losses(straight) and len(losses(filled)) == 12
        failed = [(e["step"], e["error"]) for e in events(disk / "run", "checkpoint_failed")]
        assert [step for step, _ in failed] == [4, 5, 6][: len(failed)] and "No space left" in failed[0][1]
        saved = [e["step"] for e in events(disk / "run", "checkpoint")]
        assert saved[0] in (6, 7) and saved[-2:] == [8, 12], saved
        assert [folder.name for folder in checkpoint.list_checkpoints(disk / "run")][-1] == "step-00000012"
        assert not list((disk / "run/checkpoints").glob(".step*"))


def test_a_disk_that_stays_full(base, tmp_path):
    """The last checkpoint cannot be written: the run says so, fails, and goes on from the one before when there is
    room again."""
    with mounted(tmp_path / "disk", "16m") as disk:
        straight, filled = base("straight"), base(checkpoint={"every": 4}) | {"run_dir": str(disk / "run")}
        (disk / "run").mkdir()
        first, second = run_group(tmp_path, [{"config": straight}, {"config": filled, "fill_at": 6}])
        assert first == 0
        assert second.startswith("UserError: the checkpoint of step 6 could not be written: "), second
        assert "No space left on device" in second and "goes on from its newest checkpoint" in second
        assert checkpoint.find_newest(disk / "run").name == "step-00000004"
        (disk / "run/filler").unlink()
        assert run_group(tmp_path, [{"config": filled}]) == [0]
        assert losses(filled) == losses(straight)


# --- two runs on one folder -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lrnn.pretrain.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """A process of another job that holds tmp_path/run."""
    env = {**os.environ, "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_stops_with_a_message(holder, base, tmp_path, monkeypatch):
    monkeypatch.setattr("lrnn.pretrain.run_lock.WAIT_S", 0.1)
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+, SLURM job 4711, since 20.*another"):
        RunLock(tmp_path / "run").__enter__()
    # The whole job: refused on every rank, and nothing of it is written.
    (status,) = run_group(tmp_path, [{"config": base()}])
    assert status.startswith(f"UserError: run_dir {tmp_path / 'run'} is in use by process {holder.pid}"), status
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", ".running.json"]


def test_a_process_that_is_killed_frees_the_folder(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.running.json").read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 4


def test_a_lock_is_waited_for_a_moment(holder, tmp_path, monkeypatch):
    """A job that is requeued may start while its former process ends."""
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with RunLock(tmp_path / "run"):
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir \S+file/run cannot be written \(Not a directory"):
        RunLock(tmp_path / "file/run").__enter__()
