"""Test that checkpoints are whole or invisible, all damage is seen, and any slice is read from any partition."""

import hashlib
import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from synthetic_checkpoints import SHAPES, Saver, state_of

from lrnn.errors import UserError
from lrnn.files import write_atomically
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.format import BrokenCheckpoint, find_newest, manifest_text, retain, verify
from lrnn.pretrain.checkpoint.reader import SavedState


@pytest.fixture
def save(tmp_path, monkeypatch):
    """`save(step)` writes a checkpoint of `state_of(step)` into tmp_path and returns its folder."""
    return Saver(tmp_path, monkeypatch).save


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


FILES = [
    "config.json", "manifest.json", "progress.json", "run.yaml", "state-00000-of-00001.safetensors",
    "tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json",
]  # fmt: skip


# --- what is written --------------------------------------------------------------------------------------------------


def test_contents(save, tmp_path):
    folder = save(12)
    assert folder == tmp_path / "checkpoints" / "step-00000012" and files_of(folder) == FILES
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latest", "step-00000012"]
    assert (folder.parent / "latest").read_text() == "step-00000012\n"
    assert set(verify(folder)["files"]) == set(FILES) - {"manifest.json"}
    assert checkpoint.read_progress(folder)["progress"] == {"step": 12, "samples": 96}
    state = SavedState(folder)
    assert state.parameters() == set(SHAPES)
    for (kind, name), values in state_of(12).items():
        assert torch.equal(state.read(kind, name, 0, values.numel()), values)
    save(13)
    assert (folder.parent / "latest").read_text() == "step-00000013\n"


def test_load_into_a_model(save):
    folder = save(1)
    model = torch.nn.Module()
    model.embed, model.norm = torch.nn.Embedding(7, 5), torch.nn.Module()
    model.norm.weight = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(BrokenCheckpoint, match="do not share the parameter A_log"):
        SavedState(folder).load_into(model)
    model.A_log = torch.nn.Parameter(torch.zeros(1))
    SavedState(folder).load_into(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), state_of(1)["param", name].view(SHAPES[name]))
    model.more = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(BrokenCheckpoint, match="do not share the parameter more"):
        SavedState(folder).load_into(model)


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def truncate_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path, bit: int | None = None) -> None:
    """Flip one bit of a file: the given one, or the middle one."""
    bit = file.stat().st_size * 4 if bit is None else bit
    with file.open("r+b", buffering=0) as f:  # rewriting the whole file could wait for the disk
        f.seek(bit // 8)
        changed = f.read(1)[0] ^ 1 << bit % 8
        f.seek(bit // 8)
        f.write(bytes([changed]))


@pytest.mark.parametrize("damage", [truncate, truncate_half, empty, remove, lengthen, flip])
@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_seen(save, tmp_path, name, damage):
    before, newest = save(1), save(2)
    damage(newest / name)
    with pytest.raises(BrokenCheckpoint) as error:
        verify(newest)
    assert str(newest) in str(error.value) and (name in str(error.value) or name == "manifest.json")
    warnings: list[str] = []
    assert find_newest(tmp_path, warnings.append) == before
    assert len(warnings) == 1 and str(error.value) in warnings[0]
    # The run resumes and writes the step again.
    assert find_newest(tmp_path, warnings.append) != save(2) == find_newest(tmp_path, warnings.append)


def test_any_bit_of_any_file(save):
    """A flipped bit is seen in any file. In the manifest, on which the other checks rely, every bit is tried."""
    folder = save(1)
    truth = verify(folder)
    rng = random.Random(0)
    for name in FILES:
        size = 8 * (folder / name).stat().st_size
        bits = range(size) if name == "manifest.json" else rng.sample(range(size), 16)
        for bit in bits:
            flip(folder / name, bit)
            with pytest.raises(BrokenCheckpoint):
                verify(folder)
                pytest.fail(f"bit {bit} of {name}")
            flip(folder / name, bit)
    assert verify(folder) == truth


def test_a_manifest_that_leaves_out_a_state_file(save):
    """Its parameters would be missing, or those of another file would be used instead."""
    folder = save(1)
    shutil.copy(folder / "state-00000-of-00001.safetensors", folder / "state-00001-of-00001.safetensors")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["state-00001-of-00001.safetensors"] = files.pop("state-00000-of-00001.safetensors")
    (folder / "manifest.json").write_text(manifest_text(1, files))
    with pytest.raises(
        BrokenCheckpoint, match=r"manifest\.json is damaged: it lacks state-00000-of-00001\.safetensors"
    ):
        verify(folder)


def test_a_manifest_without_its_own_checksum_or_with_entries_of_another_kind(save):
    folder = save(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for text in (json.dumps(manifest), "[]", "1", manifest_text(1, {"run.yaml": {"size": 3}})):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(BrokenCheckpoint, match=r"manifest\.json is damaged"):
            verify(folder)


@pytest.mark.parametrize("name", ["../run.yaml", "tokenizer/../../x", "tokenizer/..", "a/b", ".", "", "/etc/hostname"])
def test_a_manifest_that_names_a_file_elsewhere(save, name):
    """This holds even if the file exists and is as the manifest says."""
    folder = save(1)
    (folder.parent / "run.yaml").write_text("a")
    files = verify(folder)["files"]
    target = folder / name
    if target.is_file():
        files[name] = {"size": target.stat().st_size, "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
    else:
        files[name] = {"size": 0, "sha256": ""}
    (folder / "manifest.json").write_text(manifest_text(1, files))
    for read in (verify, SavedState):
        with pytest.raises(BrokenCheckpoint, match="which is outside the checkpoint"):
            read(folder)


def test_all_broken(save, tmp_path):
    one, two = save(1), save(2)
    truncate(one / "run.yaml")
    remove(two / "manifest.json")
    warnings: list[str] = []
    with pytest.raises(UserError, match=f"no checkpoint of {tmp_path} is intact.*choose another run_dir") as error:
        find_newest(tmp_path, warnings.append)
    assert str(two) in str(error.value) and len(warnings) == 2
    assert one.is_dir() and two.is_dir()


def test_no_checkpoint_at_all(tmp_path):
    assert find_newest(tmp_path) is None and find_newest(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("x")
    assert find_newest(tmp_path) is None


def test_another_format(save):
    folder = save(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3, "files": None}))
    with pytest.raises(BrokenCheckpoint, match="has checkpoint format 3, this program reads 2"):
        verify(folder)


# --- a process that is killed -----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_while_deleting(tmp_path, monkeypatch):
    folders = [Saver(tmp_path, monkeypatch).save(step) for step in (1, 2, 3)]
    original = shutil.rmtree

    def kill(path, *args, **kwargs):
        (Path(path) / "progress.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", kill)
        with pytest.raises(Killed):
            retain(folders[2], 2, 0)
    assert checkpoint.shutil.rmtree is original
    assert checkpoint.list_checkpoints(tmp_path) == folders[1:]
    retain(Saver(tmp_path, monkeypatch).save(4), 2, 0)  # the next run cleans up when it starts
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_latest_is_never_half_written(tmp_path, monkeypatch):
    write_atomically(tmp_path / "latest", "old\n")

    def kill(*args):
        raise Killed

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(Killed):
        write_atomically(tmp_path / "latest", "new\n")
    assert (tmp_path / "latest").read_text() == "old\n"
    monkeypatch.undo()
    write_atomically(tmp_path / "latest", "new\n")
    assert (tmp_path / "latest").read_text() == "new\n" and len(list(tmp_path.iterdir())) == 1


# --- what is kept -----------------------------------------------------------------------------------------------------


def steps(run_dir: Path) -> list[int]:
    return [int(p.name[5:]) for p in checkpoint.list_checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [70]),
        (2, 0, [60, 70]),
        (3, 20, [20, 40, 50, 60, 70]),
        (1, 30, [30, 60, 70]),
        (9, 0, [10, 20, 30, 40, 50, 60, 70]),
        (7, 0, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_retain(save, tmp_path, keep_last, keep_every, kept):
    folders = [save(step) for step in range(10, 80, 10)]
    retain(folders[-1], keep_last, keep_every)
    assert steps(tmp_path) == kept
    assert all(verify(p) for p in checkpoint.list_checkpoints(tmp_path))


def test_retain_as_the_run_goes(save, tmp_path):
    for step in range(1, 13):
        retain(save(step), 2, 5)
    assert steps(tmp_path) == [5, 10, 11, 12]


def test_broken_checkpoints_do_not_push_out_intact_ones(save, tmp_path):
    """A run that fell back to step 10 stops at step 15, which is older than the broken checkpoints of 20 and 30."""
    _, second, third = (save(step) for step in (10, 20, 30))
    flip(second / "run.yaml")
    flip(third / "run.yaml")
    warnings: list[str] = []
    assert find_newest(tmp_path, warnings.append).name == "step-00000010"
    newest = save(15)
    retain(newest, 2, 0)
    assert find_newest(tmp_path, warnings.append) == newest
    assert steps(tmp_path) == [10, 15, 20, 30]


def test_a_broken_checkpoint_does_not_count_among_the_last(save, tmp_path):
    """Steps 20 and 30 lost files: with keep_last=2, the intact ones of 10 and 40 stay."""
    for step, lost in ((10, None), (20, "manifest.json"), (30, "config.json"), (40, None)):
        folder = save(step)
        if lost:
            remove(folder / lost)
    retain(folder, 2, 0)
    assert steps(tmp_path) == [10, 20, 30, 40]
    retain(save(50), 2, 0)
    assert steps(tmp_path) == [40, 50]


# --- slices -----------------------------------------------------------------------------------------------------------


def write_partitioned(folder: Path, state: dict, rng: random.Random, files: int) -> None:
    """Save a state as `files` processes would if they held random pieces of every tensor."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for (kind, name), values in state.items():
        n = values.numel()
        cuts = sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 6)))})
        for low, high in pairwise(cuts):
            parts[rng.randrange(files)][f"{kind}:{name}:{low}"] = values[low:high].clone()
    folder.mkdir(parents=True)
    names = [f"state-{i:05d}-of-{files:05d}.safetensors" for i in range(files)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    entries = {name: {"size": (folder / name).stat().st_size, "sha256": ""} for name in names}
    (folder / "manifest.json").write_text(manifest_text(1, entries))


@pytest.mark.parametrize("seed", range(8))
def test_slices_of_random_partitions(tmp_path, seed):
    rng = random.Random(seed)
    state = {key: torch.randn(rng.choice([1, 2, 9, 200])) for key in state_of(0)}
    write_partitioned(tmp_path / "c", state, rng, files=rng.randint(1, 5))
    saved = SavedState(tmp_path / "c")
    for (kind, name), values in state.items():
        n = values.numel()
        assert torch.equal(saved.read(kind, name, 0, n), values)
        for _ in range(20):
            start = rng.randint(0, n)
            numel = rng.randint(0, n - start)
            found = saved.read(kind, name, start, numel)
            assert found.dtype == torch.float32 and torch.equal(found, values[start : start + numel])


def test_a_missing_fragment(tmp_path):
    state = {("param", "a"): torch.arange(10.0)}
    write_partitioned(tmp_path / "c", state, random.Random(3), files=1)
    file = tmp_path / "c" / "state-00000-of-00001.safetensors"
    save_file({"param:a:0": torch.arange(4.0), "param:a:6": torch.arange(6.0, 10.0)}, file)
    saved = SavedState(tmp_path / "c")
    assert torch.equal(saved.read("param", "a", 0, 4), torch.arange(4.0))
    assert torch.equal(saved.read("param", "a", 6, 4), torch.arange(6.0, 10.0))
    with pytest.raises(BrokenCheckpoint, match="lacks 2 of 8 elements of param a from element 1 on"):
        saved.read("param", "a", 1, 8)
    with pytest.raises(BrokenCheckpoint, match="lacks 1 of 2 elements of param a from element 9 on"):
        saved.read("param", "a", 9, 2)
    with pytest.raises(BrokenCheckpoint, match="lacks 3 of 3 elements of exp_avg a"):
        saved.read("exp_avg", "a", 0, 3)
