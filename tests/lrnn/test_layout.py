"""Test that rooms at the top of the repository do not shadow packages of the same name."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("room", ["kernels", "pretrain", "eval"])
def test_rooms_are_plain_folders_behind_links(room):
    """transformers imports Hugging Face's package `kernels`; a regular package of that name here would hide it."""
    assert (REPOSITORY / room).is_dir()
    assert not (REPOSITORY / room / "__init__.py").exists()
    assert (REPOSITORY / "lrnn" / room).resolve() == REPOSITORY / room
