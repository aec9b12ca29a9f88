"""Versions of transformers other than the installed one, for tests of exported folders.

Each is in a folder of its own, with the packages that it needs in other versions, and goes first on PYTHONPATH. torch
and everything else are those of the tests. The folders are fetched once, into `$LRNN_TRANSFORMERS` or
`~/.cache/lrnn/transformers`: 70 MB each.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from lrnn.files import replace_folder

# The oldest that exports support; the first of 5; the last that copies only what an entry file names; the oldest that
# lrnn itself supports; the newest.
HTTPX = ("httpx==0.28.1", "httpcore==1.0.9")
HUB_1 = ("huggingface_hub==1.33.0", *HTTPX)
VERSIONS = {
    "4.57.6": ("huggingface_hub==0.36.2", "tokenizers==0.22.2", "datasets==4.5.0", *HTTPX),
    "5.0.0": (*HUB_1, "tokenizers==0.22.2", "typer_slim==0.24.0"),
    "5.9.0": (*HUB_1, "tokenizers==0.22.2"),
    "5.17.0": HUB_1,
    "5.24.0": (),
}
OLMO_HYBRID = {"5.3.0": (*HUB_1, "tokenizers==0.22.2")}  # the first version that has this class
PEFT = ("peft==0.21.2",)


def fetched(*packages: str) -> Path:
    """Return a folder with packages, fetched from the registry if it is missing.

    Raises:
        RuntimeError: pip could not fetch them.
    """
    root = Path(os.environ.get("LRNN_TRANSFORMERS") or "~/.cache/lrnn/transformers").expanduser()
    name = f"{packages[0]}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    if not (root / name).is_dir():
        with replace_folder(root / name) as folder:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
            done = subprocess.run([*command, "--target", folder, *packages], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"pip cannot fetch {' '.join(packages)}: {done.stderr.strip()[-500:]}")
    return root / name


def environment(version: str, *more: Path) -> dict[str, str]:
    """Return the variables of a process that has a version of transformers, and perhaps other folders of packages."""
    folders = [fetched(f"transformers=={version}", *(VERSIONS | OLMO_HYBRID)[version]), *more]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
