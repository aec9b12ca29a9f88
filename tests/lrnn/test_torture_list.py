"""Test that `make torture` runs every file of tests that has a long form."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
VARIABLE = "LRNN_" + "TORTURE"


def test_every_long_form_is_in_the_list():
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    (command,) = (line for line in lines if VARIABLE in line and "pytest" in line)
    listed = [ROOT / word for word in command.split() if word.startswith("tests/")]
    listed.append(ROOT / "tests/kernels/interpreted")  # which test_interpreted.py runs
    long = [file for file in (ROOT / "tests").rglob("test_*.py") if VARIABLE in file.read_text()]
    assert len(long) > 15 and all(path.exists() for path in listed)
    missing = [str(file.relative_to(ROOT)) for file in long if not {file, *file.parents} & set(listed)]
    assert missing == []
