"""Test storage that fails during training, and a second run on the same folder."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import without_models
from small_disk import mounted
from training_group import losses, run_command, run_group

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.corpus.block_reader import CorruptData
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data.samples import CorpusData
from lrnn.records import read_metrics
from lrnn.run_lock import RunLock


def events(run_dir: Path, name: str) -> list[dict]:
    return [r for r in read_metrics(run_dir) if r.get("event") == name]


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while(base, tmp_path):
    """The run continues, its records wait in memory, and the checkpoint is written as soon as there is room."""
    with mounted(tmp_path / "disk", "16m") as disk:
        settings = {"steps": 12, "checkpoint": {"every": 4, "keep_last": 2}}
        straight = base("straight", **settings)
        filled = base(**settings) | {"run_dir": str(disk / "run")}
        (disk / "run").mkdir()
        specs = [{"config": straight}, {"config": filled, "fill_at": 4, "free_at": 7}]
        assert run_group(tmp_path, specs) == [0, 0]
        assert losses(filled) == losses(straight) and len(losses(filled)) == 12
        failed = [(e["step"], e["error"]) for e in events(disk / "run", "checkpoint_failed")]
        # How many attempts there were depends on how long the disk takes to refuse them.
        assert failed[0][0] == 4 and {step for step, _ in failed} <= {4, 5, 6} and "No space left" in failed[0][1]
        saved = [e["step"] for e in events(disk / "run", "checkpoint")]
        assert saved[0] in (5, 6, 7) and saved[-2:] == [8, 12], saved
        assert [folder.name for folder in checkpoint.list_checkpoints(disk / "run")][-1] == "step-00000012"
        assert not list((disk / "run/checkpoints").glob(".step*"))


def test_a_disk_that_stays_full(base, tmp_path):
    """If the last checkpoint cannot be written, the run says so and fails. It resumes from the one before."""
    with mounted(tmp_path / "disk", "16m") as disk:
        straight, filled = base("straight"), base(checkpoint={"every": 4}) | {"run_dir": str(disk / "run")}
        (disk / "run").mkdir()
        first, second = run_group(tmp_path, [{"config": straight}, {"config": filled, "fill_at": 6}])
        assert first == 0
        assert second.startswith("UserError: the checkpoint of step 6 could not be written: "), second
        assert "No space left on device" in second and "resumes the run from its newest checkpoint" in second
        assert checkpoint.find_newest(disk / "run").name == "step-00000004"
        (disk / "run/filler").unlink()
        assert run_group(tmp_path, [{"config": filled}]) == [0]
        assert losses(filled) == losses(straight)


def test_a_log_that_cannot_be_written(base, tmp_path):
    """The output of a job is often on the disk that is full. The run continues, and its exit status is right."""
    (tmp_path / "run.yaml").write_text(json.dumps(base(steps=3)))
    command = [sys.executable, "-m", "lrnn.cli", "pretrain", str(tmp_path / "run.yaml"), "--nproc", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [1, 2, 3]


# --- a corpus that breaks in the middle of a run ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact_corpus(corpora, tmp_path_factory) -> Path:
    """Return a corpus of several blocks."""
    folder = tmp_path_factory.mktemp("intact")
    (folder / "text").mkdir()
    rng = random.Random(0)
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(rng.choices("abcdef \n", k=20_000)))
    options = ["--tokenizer", str(corpora / "a" / "tokenizer"), "--processes", "1", "--heldout", "0.1"]
    assert main(["corpus", str(folder / "text"), *options, "--out", str(folder / "long")]) == 0
    return folder / "long"


@pytest.fixture
def long_corpus(intact_corpus, tmp_path) -> tuple[Path, Path]:
    """Return a copy of the corpus, and its shard."""
    shutil.copytree(intact_corpus, tmp_path / "long")
    (shard,) = (tmp_path / "long/train").glob("*.arrow")
    return tmp_path / "long", shard


def on(corpus: Path, config: dict) -> dict:
    """Return a configuration with another corpus."""
    return config | {"data": config["data"] | {"corpora": [{"path": str(corpus)}]}}


@pytest.fixture(scope="module")
def straight(config_in, intact_corpus, tmp_path_factory) -> dict:
    """Return the losses of a run on the intact corpus."""
    folder = tmp_path_factory.mktemp("straight")
    config = on(intact_corpus, config_in(folder))
    assert run_group(folder, [{"config": config}]) == [0]
    return losses(config)


def damage(corpus: Path, shard: Path, rank: int) -> int:
    """Change a byte that only `rank` of two processes reads first. Return how many steps come before that."""

    def readable(data: CorpusData, micro_batch: int) -> bool:
        try:
            data.batch(np.array([2 * micro_batch, 2 * micro_batch + 1]))
        except CorruptData:
            return False
        return True

    good = shard.read_bytes()
    for at in range(len(good) - 100, len(good) // 10, -(1 << 16)):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        data = CorpusData([TokenCorpus(corpus)], [1.0], seq_len=64, seed=0)
        for step in range(6):
            bad = [m for m in range(4 * step, 4 * step + 4) if not readable(data, m)]
            if bad and step > 0 and {m % 2 for m in bad} == {rank}:
                return step
            if bad:
                break
    raise AssertionError("no block that this rank alone reads first")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_is_corrupt(base, long_corpus, straight, tmp_path, rank):
    """Whichever process reads it, the run ends on all of them with one message and a checkpoint of the steps so far.
    After the shard is fixed, the run resumes as if nothing had happened."""
    corpus, shard = long_corpus
    good = shard.read_bytes()
    broken = on(corpus, base("broken"))
    step = damage(corpus, shard, rank)
    (status,) = run_group(tmp_path, [{"config": broken}])
    samples = re.search(r"while reading samples (\d+)\.\.(\d+)\)", status)
    assert status.startswith(f"UserError: corpus {corpus}: shard train/{shard.name} is corrupt in bytes"), status
    assert 8 * step <= int(samples[1]) < int(samples[2]) < 8 * step + 8 and int(samples[1]) // 2 % 2 == rank
    assert f"the run stopped at step {step}, and its checkpoint is written" in status
    assert checkpoint.find_newest(tmp_path / "broken").name == f"step-{step:08d}"
    if rank == 1:  # the command line prints one line, from the main process, and exits with status 2
        (tmp_path / "run.yaml").write_text(json.dumps(broken))
        statuses, errors = run_command(tmp_path, ["pretrain", str(tmp_path / "run.yaml")])
        assert statuses == [2, 2] and errors.count("\n") == 1, errors
        assert errors.startswith(f"lrnn: error: corpus {corpus}: shard train/{shard.name} is corrupt")
    shard.write_bytes(good)
    assert run_group(tmp_path, [{"config": broken}]) == [0]
    assert losses(broken) == straight


def test_a_shard_that_vanishes(base, long_corpus, tmp_path):
    """A file that is removed while it is read stays readable for those who have it open; the next start names it."""
    corpus, shard = long_corpus
    config = on(corpus, base(steps=8))
    specs = [{"config": config, "remove": [3, str(shard)]}, {"config": config | {"steps": 9}}]
    first, second = run_group(tmp_path, specs)
    assert first == 0 and not shard.exists()
    assert second.startswith(f"UserError: corpus {corpus}: shard train/{shard.name} cannot be read (No such file or ")


# --- two runs on one folder -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from without_models import leave_models_out
leave_models_out()
from lrnn.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Return a process of another job that holds tmp_path/run."""
    env = {**without_models.ENVIRONMENT, "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_stops_with_a_message(holder, base, tmp_path, monkeypatch):
    monkeypatch.setattr("lrnn.run_lock.WAIT_S", 0.1)
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+, SLURM job 4711, since 20.*another"):
        RunLock(tmp_path / "run").__enter__()
    # The whole job is refused on every rank, and writes nothing.
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
    """A requeued job may start before its earlier process has ended."""
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with RunLock(tmp_path / "run"):
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir \S+file/run cannot be written \(Not a directory"):
        RunLock(tmp_path / "file/run").__enter__()
