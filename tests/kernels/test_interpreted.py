"""Run `tests/kernels/interpreted` in a separate process, where Triton interprets kernels and compiles none."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-rp", "-p", "no:cacheprovider"]
    # Most of the time goes into NumPy calls on small arrays, where more threads would only wait for each other.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for name in [n for n in environment if n == "PYTEST_ADDOPTS" or n.startswith("PYTEST_XDIST")]:
        del environment[name]  # set by the outer pytest
    result = subprocess.run(
        command, cwd=FOLDER.parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, "a test in the interpreter failed; its output is above"
    ran = set(re.findall(r"^PASSED \S*?(test_\w+\.py)::", result.stdout, re.MULTILINE))
    assert ran == {path.name for path in FOLDER.glob("test_*.py")}, "a file was not collected"
    assert not re.search(r"\d+ (skipped|xfailed|deselected)", result.stdout)
