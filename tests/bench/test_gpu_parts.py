"""`tests/benchmarks/gpu_parts.py` as a command, with names in place of GPUs: order, limits, and what a cut leaves."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from lrnn.pretrain.config import load_config, load_model_of

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_parts.py"


@pytest.fixture
def start(tmp_path):
    """`start(parts, *options, gpus=...)` starts the command."""

    def begin(parts, *options, gpus="a,b"):
        (tmp_path / "parts.yaml").write_text(yaml.safe_dump({"parts": parts}))
        folders = [tmp_path / "parts.yaml", tmp_path / "work", tmp_path / "out"]
        command = [sys.executable, SCRIPT, *folders, *options]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def part(name, run, **fields):
    return {"name": name, "run": run, "limit": 20, **fields}


def meet(name, other):
    """Return a command that ends well only while another one runs."""
    return f"touch $WORK/{name}; until [ -e $WORK/{other} ]; do sleep 0.02; done; echo $CUDA_VISIBLE_DEVICES"


def test_order_and_limits(start, tmp_path):
    """Two parts meet on two GPUs, one after them has both, and what fails or lasts too long takes nothing with it."""
    parts = [
        part("first", meet("one", "two")),
        part("second", meet("two", "one")),
        part("both", "echo got $CUDA_VISIBLE_DEVICES; echo kept >$RESULTS/file", gpus=2),
        part("none", "echo no GPU: $CUDA_VISIBLE_DEVICES.", gpus=0),
        part("fails", "exit 3"),
        part("follows", "echo no", after=["fails"]),
        part("long", "echo begun; sleep 60", limit=0.5),
        part("large", "echo no", gpus=3),
        part("last", "echo end", after=["first", "both"]),
    ]
    process = start(parts)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    table = {line.split()[0]: line for line in printed.split("outputs.txt\n")[1].splitlines()}
    assert list(table) == [p["name"] for p in parts]
    said = {"first": "status 0", "second": "status 0", "both": "status 0", "none": "status 0", "fails": "status 3"}
    said |= {"follows": "left out: fails failed", "long": "cut off after its 0 s", "large": "left out: needs 3 GPUs"}
    assert {name: text for name, text in said.items() if text not in table[name]} == {}
    outputs = (tmp_path / "out" / "outputs.txt").read_text()
    assert "got a,b" in outputs and "no GPU: ." in outputs and "\nbegun" in outputs and "\nend" in outputs
    assert {table["first"][-1], table["second"][-1]} == {"a", "b"}
    with tarfile.open(tmp_path / "out" / "files.tar.gz") as tar:
        assert tar.extractfile("results/file").read() == b"kept\n"


def test_the_time_of_all(start, tmp_path):
    parts = [part("long", "echo begun; sleep 60"), part("waits", "echo no")]
    printed, _ = start(parts, "--limit", "1.5", gpus="a").communicate(timeout=60)
    assert "long                     cut off: the time of all is up" in printed
    assert "waits                    not started: the time of all is up" in printed
    assert "\nbegun" in (tmp_path / "out" / "outputs.txt").read_text()


def test_a_signal_ends_all_parts(start, tmp_path):
    process = start([part("long", "echo $$ >$WORK/pid; echo begun; sleep 60")])
    file = tmp_path / "work" / "pid"
    while not (file.exists() and file.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert "long                     cut off: a signal came" in printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert "\nbegun" in (tmp_path / "out" / "outputs.txt").read_text()


def test_some_of_the_parts(start):
    parts = [part("base", "true"), part("other", "true"), part("wanted", "true", after=["base"])]
    printed, _ = start(parts, "--only", "wanted").communicate(timeout=60)
    assert "base" in printed and "wanted" in printed and "other" not in printed
    printed, _ = start(parts, "--only", "unknown").communicate(timeout=60)
    assert "there is no part 'unknown'; it has base, other, wanted" in printed


@pytest.mark.parametrize("file", sorted((SCRIPT.parent / "parts").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_lists_of_parts(file):
    """Their commands are shell, their files exist, and runs of 340m that they quote are valid."""
    sys.path.append(str(SCRIPT.parent))
    from gpu_parts import read_parts

    parts = read_parts(file, [])
    assert len({part.name for part in parts}) == len(parts) > 1
    for part in parts:
        assert subprocess.run(["bash", "-n", "-c", part.run], check=False).returncode == 0, part.name
        for word in part.run.replace("'", " ").split():
            if word.startswith("tests/"):
                assert (SCRIPT.parents[2] / word.partition("::")[0]).exists(), word
        for quoted in re.findall(r'"(?:\w+: )?(340m[^"$]*)"', part.run):
            config, *overrides = quoted.split()
            load_model_of(load_config(config, overrides))
