"""Test the permissions of files that are copied, or written by libraries that ignore the umask, and whole folders."""

import os
import stat
from pathlib import Path

import pytest

from lrnn.files import copy_files, replace_folder, use_default_mode


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


@pytest.fixture(params=[(0o022, "0o644", "0o755"), (0o007, "0o660", "0o770")])
def modes(request):
    """Set a umask, and return the modes that it gives to files and folders."""
    before = os.umask(request.param[0])
    yield request.param[1:]
    os.umask(before)


def test_default_mode(tmp_path, modes):
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o600)
    use_default_mode(file)
    assert mode(file) == modes[0] and os.listdir(tmp_path) == ["file"]


def test_copies_do_not_inherit_permissions(tmp_path, modes):
    """A folder copied from read-only storage could otherwise not be deleted with its checkpoint."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("content")
    (source / "a").chmod(0o400)
    source.chmod(0o500)
    copy_files(source, tmp_path / "copy")
    source.chmod(0o700)  # so that it can be deleted
    assert (mode(tmp_path / "copy/a"), mode(tmp_path / "copy")) == modes
    assert (tmp_path / "copy/a").read_text() == "content"


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    """In a container, the next process has the same number."""
    left = tmp_path / f".out.new.{os.getpid()}"
    left.mkdir()
    for text in ("first", "second"):
        with replace_folder(tmp_path / "out") as new:
            (new / "file").write_text(text)
        assert (tmp_path / "out/file").read_text() == text
    assert sorted(os.listdir(tmp_path)) == [left.name, "out"]
