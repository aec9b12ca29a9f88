"""`lrnn submit`: the script that it fills in, and what it refuses. On a real SLURM: tests/slurm/test_jobs.py."""

import subprocess
from pathlib import Path

import pytest

from lrnn.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def submit(tmp_path, capsys):
    """`submit(*arguments)` runs the command on the tiny model; gives (status, what it printed)."""

    def run(*arguments: str) -> tuple[int, str]:
        tiny = [f"run_dir={tmp_path / 'run'}", f"model={ROOT / 'configs/models/tiny.json'}", "data.corpora=[{path: x}]"]
        tiny += [f"deepspeed={ROOT / 'configs/deepspeed/zero2.json'}"]
        status = main(["submit", str(ROOT / "configs/tiny.yaml"), *tiny, *arguments])
        return status, "".join(capsys.readouterr())

    return run


def test_dry_run_shows_a_script_that_bash_can_read(submit, tmp_path):
    status, shown = submit(
        "--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--sbatch", "account=nlp", "global_batch_size=8",
        "micro_batch_size=1", "--dry-run",
    )  # fmt: skip
    assert status == 0, shown
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=1:00:00", "account=nlp", "signal=USR1@300"):
        assert shown.count(f"#SBATCH --{line}\n") == 1, line
    assert f"#SBATCH --output={tmp_path / 'run' / 'slurm.log'}\n" in shown and "--requeue" in shown
    assert "new run" in shown and not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)
    # What the script runs is the command with its overrides, whatever characters they hold.
    (arguments,) = [line for line in shown.splitlines() if line.startswith("set -- ")]
    said = subprocess.run(
        ["bash", "-c", arguments + '; printf "%s\\n" "$@"'], capture_output=True, text=True, check=True
    )
    assert "data.corpora=[{path: x}]" in said.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0"], ["--nodes 0", "at least 1"]),
        (["--sbatch", "comment=x"], ["comment=x", "cannot be set"]),
        (["--sbatch", "p"], ["--sbatch p", "partition=h100"]),
        (["--template", "nothing.sbatch"], ["nothing.sbatch", "train.sbatch"]),
        (["--nodes", "3", "--gpus-per-node", "1", "global_batch_size=8"], ["global_batch_size", "3"]),
    ],
)
def test_what_cannot_be_submitted_is_said_at_once(submit, arguments, words):
    status, said = submit(*arguments, "--dry-run")
    assert status == 2 and all(word in said for word in words), said


def test_without_slurm_it_says_what_is_missing(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, said = submit("--nodes", "1", "--gpus-per-node", "0")
    assert status == 2 and "squeue is not found" in said and not (tmp_path / "run").exists()
