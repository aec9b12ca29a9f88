"""Test the words that start a container on SLURM, and which folders are mounted into it."""

from pathlib import Path

import pytest

from lrnn import container
from lrnn.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return the current folder, with a cache of Triton and a folder for temporary files beside it."""
    for name in ("project/configs", "triton", "tmp", "disk/corpus"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "project/lrnn.sif").touch()
    (tmp_path / "disk/tokenizer.model").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path


def test_without_an_image_there_are_no_words(here):
    assert container.words(None, [here]) == []


def test_apptainer(here):
    paths = [Path("configs/run.yaml"), here / "link/corpus", here / "disk/tokenizer.model"]
    words = container.words("lrnn.sif", paths)
    assert words[:3] == ["apptainer", "exec", "--nv"]
    mounts = [words[i + 1] for i, word in enumerate(words) if word == "--bind"]
    # configs is within the current folder, disk/corpus within disk; the link is wanted under its own name too.
    assert mounts == [str(here / name) for name in ("disk", "link/corpus", "project", "tmp", "triton")]
    assert words[-3:] == ["--pwd", str(here / "project"), str(here / "project/lrnn.sif")]
    assert container.words("docker://lab/lrnn:1", [])[-1] == "docker://lab/lrnn:1"


def test_pyxis(here):
    (here / "lrnn.sqsh").touch()
    for image in (str(here / "lrnn.sqsh"), "registry.lab#lrnn:1"):
        mounts = ",".join(f"{here / name}:{here / name}" for name in ("disk", "project", "tmp", "triton"))
        assert container.words(image, [here / "disk"]) == [
            f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={here / 'project'}",
        ]  # fmt: skip


@pytest.mark.parametrize("image", ["gone.sif", "/gone.sqsh", "./gone"])
def test_an_image_that_is_not_there(here, image):
    with pytest.raises(UserError, match=f"--container {image} is not a file; docker/ builds images of lrnn"):
        container.words(image, [])


def test_a_path_that_cannot_be_mounted(here):
    (here / "a,b").mkdir()
    with pytest.raises(UserError, match="a,b cannot be mounted into a container: its name has a comma or a colon"):
        container.words("lrnn.sif", [here / "a,b"])


def test_paths_in_settings(here):
    settings = {
        "run_dir": "runs/new",
        "n": 1,
        "data": {"corpora": [{"path": str(here / "disk/corpus")}]},
        "mixer": "gla",
    }
    assert list(container.paths_in(settings)) == [here / "disk/corpus"]
