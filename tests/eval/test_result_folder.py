"""Test which folders results may be written to."""

import os

import pytest

from lrnn.errors import UserError
from lrnn.eval.result_folder import check_output


def test_a_folder_that_can_be_written(tmp_path):
    check_output(tmp_path / "new/newer")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "empty/results.json").touch()
    check_output(tmp_path / "empty")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; it must be a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(UserError, match=f"it cannot be a folder: {tmp_path}/file is a file"):
        check_output(tmp_path / "file/below/it")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files and no results\.json"):
        check_output(tmp_path)


def test_a_folder_of_somebody_else(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK | os.X_OK))
    check_output(tmp_path.parent / "other/fast")
    for out in (tmp_path / "eval/fast", tmp_path / "fast"):
        with pytest.raises(UserError, match=f"{out} cannot be written, because {tmp_path} is read-only; name another"):
            check_output(out)
