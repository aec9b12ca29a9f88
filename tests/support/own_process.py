"""Run Python code in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, tmp_path: Path, *arguments: str) -> str:
    """Run Python code in a separate process, outside the repository, and return what it prints."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    env["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
