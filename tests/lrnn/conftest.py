"""Fixtures: lrnn's sdist, its wheel, and an installation of it."""

import tarfile
from pathlib import Path

import pytest
from installation import build, copy_repository, install


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Return the sdist of a copy of the repository, so that no earlier build is part of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    copy_repository(source)
    return build("sdist", source, out)


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory) -> Path:
    """Return the wheel that is built from the sdist."""
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(source, filter="data")
    (top,) = source.iterdir()
    return build("wheel", top, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """Return the folder into which pip installed the wheel."""
    target = tmp_path_factory.mktemp("site")
    install(wheel, target)
    return target
