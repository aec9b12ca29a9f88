"""Test that checkpoints are written whole or not at all while training continues, and failing storage ends no run."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_disk import mounted
from synthetic_checkpoints import Saver, ThreadRank, state_of

from lrnn.errors import UserError
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint import writer as checkpoint_writer
from lrnn.pretrain.checkpoint.format import find_newest, list_checkpoints, verify
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.checkpoint.writer import BUSY, READY


def assert_holds(folder: Path, step: int) -> None:
    verify(folder)
    saved = SavedState(folder)
    for (kind, name), values in state_of(step).items():
        assert torch.equal(saved.read(kind, name, 0, values.numel()), values)


class Gate:
    """A gate that holds the writing thread until it is opened."""

    def __init__(self, monkeypatch):
        self._opened = threading.Event()
        original = checkpoint_writer.safetensors.torch.save_file

        def save_file(*arguments):
            assert self._opened.wait(20)
            original(*arguments)

        monkeypatch.setattr(checkpoint_writer.safetensors.torch, "save_file", save_file)

    def open(self) -> None:
        self._opened.set()


def test_training_continues_while_it_is_written(tmp_path, monkeypatch):
    saver = Saver(tmp_path, monkeypatch, background=True)
    gate, state = Gate(monkeypatch), state_of(1)
    saver.begin(1, state)
    for values in state.values():  # the next step changes the state
        values.fill_(7)
    assert saver.writer.vote == BUSY
    saver.writer.advance(BUSY)
    assert not saver.outcomes and list_checkpoints(tmp_path) == []
    gate.open()
    saver.writer.wait()
    (outcome,) = saver.outcomes
    assert outcome.step == saver.writer.saved_step == 1 and outcome.error is None and saver.writer.vote == READY
    assert outcome.stall_s < outcome.write_s
    assert_holds(outcome.folder, 1)


def test_one_at_a_time_and_in_order(tmp_path, monkeypatch):
    saver = Saver(tmp_path, monkeypatch, background=True, keep_last=2)
    for step in range(1, 6):
        saver.begin(step)
    saver.writer.wait()
    assert [outcome.step for outcome in saver.outcomes] == [1, 2, 3, 4, 5]
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["4", "5"]
    for step in (4, 5):
        assert_holds(tmp_path / f"checkpoints/step-0000000{step}", step)


def test_several_processes(tmp_path, monkeypatch):
    """Three processes save at their own pace, and a single one reads all of it back."""
    meeting, values = threading.Barrier(3, timeout=20), [None] * 3

    def rank(number: int) -> list:
        saver = Saver(tmp_path, monkeypatch, ThreadRank(number, values, meeting), background=True)
        for step in (7, 8):
            saver.begin(step)
        saver.writer.wait()
        return saver.outcomes

    with ThreadPoolExecutor(3) as pool:
        reported = [task.result() for task in [pool.submit(rank, number) for number in range(3)]]
    assert [[outcome.step for outcome in outcomes] for outcomes in reported] == [[7, 8]] * 3
    for outcome in reported[0]:
        names = sorted(p.name for p in outcome.folder.glob("state-*"))
        assert names == [f"state-0000{i}-of-00003.safetensors" for i in range(3)]
        assert_holds(outcome.folder, outcome.step)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path, monkeypatch, umask, mode):
    before = os.umask(umask)
    try:
        folder = Saver(tmp_path, monkeypatch).save(1)
    finally:
        os.umask(before)
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in folder.rglob("*") if p.is_file()} == {
        p.name: oct(mode) for p in folder.rglob("*") if p.is_file()
    }
    assert not list(folder.rglob(".*")), "a file that only served to learn the permissions is left"


class Killed(BaseException):
    pass


PLACES = ["save_file", "seal", "write_manifest", "sync", "rename", "write_atomically"]
HOLDERS = {
    "save_file": checkpoint_writer.safetensors.torch,
    "rename": Path,
    "write_atomically": checkpoint_writer,
}  # the functions that are not in `format`


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_saving(tmp_path, monkeypatch, place):
    """Wherever the process is killed, the newest checkpoint is whole, and the next run works and cleans up."""
    before = Saver(tmp_path, monkeypatch).save(1)

    def kill(*args, **kwargs):
        raise Killed

    holder = HOLDERS.get(place, checkpoint)
    with monkeypatch.context() as patch:
        saver = Saver(tmp_path, monkeypatch)
        patch.setattr(holder, place, kill)
        with pytest.raises(Killed):
            saver.save(2)
    newest = find_newest(tmp_path)
    if place == "write_atomically":  # after the rename it exists, even if `latest` names another
        assert newest is not None and newest.name == "step-00000002"
    else:
        assert newest == before
        assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    after = Saver(tmp_path, monkeypatch).save(3)  # a run that was resumed need not stop at the same step
    assert find_newest(tmp_path) == after
    assert not list(after.parent.glob(".*")), "a partial checkpoint stays for ever"


def test_a_rank_that_outlives_its_run_cannot_write_into_a_later_run(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    old = Saver(tmp_path, monkeypatch, background=True)
    old.begin(4, state_of(1))
    new = Saver(tmp_path, monkeypatch, background=True)
    new.begin(4)
    gate.open()
    new.writer.wait()
    old.writer.__exit__(None)  # its thread ends, but commits nothing without the others
    assert_holds(new.outcomes[0].folder, 4)


# --- storage that fails -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "64k") as folder:
        yield folder


def test_a_full_disk(small_disk, monkeypatch):
    """The checkpoint fails and says why, the one before stays, and the next attempt comes soon."""
    saver = Saver(small_disk, monkeypatch, every=50)
    before = saver.save(50)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * (1 << 20))
    assert [saver.writer.due(step) for step in (55, 100)] == [False, True]
    saver.begin(100)
    failed = saver.outcomes[-1]
    assert failed.step == 100 and "No space left on device" in failed.error and saver.writer.error == failed.error
    assert find_newest(small_disk) == before and saver.writer.saved_step == 50
    assert [saver.writer.due(step) for step in (104, 105, 110)] == [False, True, True]
    filler.unlink()
    after = saver.save(105)
    assert find_newest(small_disk) == after and saver.writer.error is None and not saver.writer.due(110)
    assert sorted(p.name for p in after.parent.iterdir()) == ["latest", before.name, after.name]


@pytest.mark.parametrize("place", PLACES)
def test_an_error_at_any_place(tmp_path, monkeypatch, place):
    """If any call of the operating system fails, it is reported, the previous checkpoint stays, and later ones work."""
    saver = Saver(tmp_path, monkeypatch)
    before = saver.save(1)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    holder = HOLDERS.get(place, checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(holder, place, fail)
        saver.begin(2)
    outcome = saver.outcomes[-1]
    if place == "write_atomically":  # after the rename the checkpoint exists
        assert outcome.error is None and "Input/output error" in outcome.warning
        assert find_newest(tmp_path) == outcome.folder
    else:
        assert "Input/output error" in outcome.error and find_newest(tmp_path) == before
    assert find_newest(tmp_path) != saver.save(3) == find_newest(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".step*"))


def test_storage_that_went_away_is_not_recreated(tmp_path, monkeypatch):
    """An unmounted run folder is an empty folder of the disk below it, where nothing may be written."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    saver = Saver(run_dir, monkeypatch)
    saver.save(1)
    run_dir.rename(tmp_path / "away")
    run_dir.mkdir()
    saver.begin(2)
    assert "No such file or directory" in saver.outcomes[-1].error and list(run_dir.iterdir()) == []
    run_dir.rmdir()
    (tmp_path / "away").rename(run_dir)
    saver.save(3)


def test_one_rank_fails(tmp_path, monkeypatch):
    """If one rank cannot write its part there is no checkpoint, and the message says which rank it was."""
    meeting, values = threading.Barrier(2, timeout=20), [None] * 2
    original = checkpoint_writer.safetensors.torch.save_file

    def save_file(tensors, path):
        if path.name.startswith("state-00001"):
            raise OSError(116, "Stale file handle")
        original(tensors, path)

    monkeypatch.setattr(checkpoint_writer.safetensors.torch, "save_file", save_file)

    def rank(number: int) -> list:
        saver = Saver(tmp_path, monkeypatch, ThreadRank(number, values, meeting))
        saver.begin(1)
        return saver.outcomes

    with ThreadPoolExecutor(2) as pool:
        reported = [task.result() for task in [pool.submit(rank, number) for number in range(2)]]
    for (outcome,) in reported:
        assert "Stale file handle" in outcome.error and "(rank 1)" in outcome.error
    assert find_newest(tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"checkpoints cannot be written \(File exists"):
        Saver(tmp_path, monkeypatch)


def test_an_error_that_is_not_of_storage_is_raised(tmp_path, monkeypatch):
    def fail(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(checkpoint, "seal", fail)
    with pytest.raises(TypeError, match="a bug"):
        Saver(tmp_path, monkeypatch).save(1)
