"""Test that the help of the command line takes no time."""

import resource

import pytest
from own_process import run

HEAVY = ("torch", "transformers")
CPU_SECONDS = 0.5


def help_of(*arguments: str) -> str:
    """Return code that prints the help of a command, and then which of the heavy packages have been imported."""
    return (
        "import sys\n"
        "from lrnn import cli\n"
        f"try: cli.main([{', '.join(map(repr, arguments))}])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        f"print('IMPORTED', [name for name in {HEAVY} if name in sys.modules])"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["plan", "--help"]], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(arguments, tmp_path):
    out = run(help_of(*arguments), tmp_path)
    assert out.startswith("usage: lrnn") and out.endswith("IMPORTED []\n")


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"]], ids=" ".join)
def test_help_takes_no_time(arguments, tmp_path):
    def used() -> float:
        times = resource.getrusage(resource.RUSAGE_CHILDREN)
        return times.ru_utime + times.ru_stime

    taken = []
    for _ in range(3):  # the first run may compile files
        before = used()
        run(help_of(*arguments), tmp_path)
        taken.append(used() - before)
    assert min(taken) < CPU_SECONDS
