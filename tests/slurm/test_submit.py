"""`lrnn submit` with stubs of SLURM's commands: the script that it makes, and what it refuses."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from lrnn.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/tiny.yaml")


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """`submit(*arguments, queue="")` with what squeue prints; gives (status, stdout, stderr, calls of sbatch)."""
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()
    (stubs / "squeue").write_text(f'#!/bin/sh\ncat "{tmp_path}/queue"\n')
    refusal = 'if [ -n "$REFUSED" ]; then echo "sbatch: error: $REFUSED" >&2; exit 1; fi\n'
    (stubs / "sbatch").write_text(f'#!/bin/sh\n{refusal}echo "$@" >> "{calls}"; echo "4711;cluster"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)  # tiny.yaml names its files from there

    def run(*arguments: str, queue: str = ""):
        (tmp_path / "queue").write_text(queue)
        calls.unlink(missing_ok=True)
        status = main(["submit", CONFIG, f"run_dir={tmp_path / 'my run'}", *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err, calls.read_text().split("\n")[:-1] if calls.exists() else []

    return run


def directives(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    options = [shlex.split(line)[1].removeprefix("--").partition("=")[::2] for line in lines]
    assert len(dict(options)) == len(options), "an option that stands twice"
    return dict(options)


def test_the_script(submit, tmp_path):
    status, out, _, calls = submit("--nodes", "2", "--gpus-per-node", "1", "--time", "1:00:00", "--sbatch", "qos=high")
    script = (tmp_path / "my run/train.sbatch").read_text()
    assert status == 0 and calls == [f"--parsable {tmp_path}/my run/train.sbatch"]
    assert script in out and "submitted job 4711: new run" in out
    found, run = directives(script), str(tmp_path / "my run")
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("2", "1", "1")
    assert (found["time"], found["qos"], found["output"]) == ("1:00:00", "high", f"{run}/slurm.log")
    assert found["comment"] == f"lrnn run_dir={run}" and found["chdir"] == str(ROOT)
    # The template's own lines stay.
    assert found["signal"] == "USR1@300" and "requeue" in found and found["open-mode"] == "append"
    arguments = next(line for line in script.splitlines() if line.startswith("set -- "))
    assert shlex.split(arguments)[2:] == [CONFIG, f"run_dir={run}"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_on_cpu_there_is_a_task_a_node(submit):
    _, out, _, _ = submit("--nodes", "2", "--gpus-per-node", "0", "--dry-run")
    found = directives(out)
    assert found["ntasks-per-node"] == "1" and "gpus-per-node" not in found


def test_dry_run_only_shows(submit, tmp_path):
    status, out, _, calls = submit("--gpus-per-node", "2", "--dry-run")
    assert status == 0 and calls == [] and not (tmp_path / "my run").exists()
    assert out.startswith("#!/usr/bin/env bash") and "not submitted (--dry-run)" in out


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD"])
def test_a_second_job_is_refused(submit, tmp_path, state):
    queue = f"11|RUNNING|None|(null)\n12|{state}|BeginTime|lrnn run_dir={tmp_path}/my run\n"
    status, _, err, calls = submit("--gpus-per-node", "2", queue=queue)
    assert status == 2 and calls == [] and err.count("\n") == 1
    assert f"my run has job 12 already ({state}, BeginTime)" in err and "scancel 12" in err


def test_other_jobs_do_not_matter(submit, tmp_path):
    """Of another run, or of this one and over."""
    queue = f"11|RUNNING|None|lrnn run_dir={tmp_path}/my run 2\n12|FAILED|None|lrnn run_dir={tmp_path}/my run\n"
    assert submit("--gpus-per-node", "2", queue=queue)[0] == 0


def test_what_is_wrong_is_said_before_the_queue(submit, monkeypatch, tmp_path):
    for arguments, message in [
        (["--nodes", "0"], "--nodes 0 should be a number, at least 1"),
        (["--nodes", "3"], "global_batch_size"),
        (["--sbatch", "nodes=3"], "--sbatch nodes=3 cannot be set: use --nodes"),
        (["--sbatch", "3"], "--sbatch 3 should be a long option"),
        (["--template", "nowhere"], "--template nowhere cannot be read"),
        (["steps=x"], "steps"),
    ]:
        status, _, err, calls = submit(*arguments)
        assert status == 2 and calls == [] and message in err, (arguments, err)
    monkeypatch.setenv("REFUSED", "invalid partition specified: x")
    assert "sbatch failed: sbatch: error: invalid partition specified: x" in submit("--gpus-per-node", "2")[2]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "squeue is not found" in submit("--gpus-per-node", "2")[2]


def test_resume_is_announced_where_there_is_a_checkpoint(submit, tmp_path):
    (tmp_path / "my run/checkpoints/step-00000050").mkdir(parents=True)
    assert "resumes" in (out := submit("--gpus-per-node", "2")[1]) and "(step 50 of 200)" in out


def test_a_finished_run_is_not_submitted(submit, tmp_path):
    folder = tmp_path / "my run/checkpoints/step-00000200"
    folder.mkdir(parents=True)
    manifest = {"format_version": 1, "step": 200, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    status, _, err, calls = submit("--gpus-per-node", "2")
    assert status == 2 and calls == [] and "is finished" in err and "step 200 of 200" in err
    assert submit("--gpus-per-node", "2", "steps=300")[0] == 0
