"""`lrnn submit` with stubs of SLURM's commands: the script that it writes, and what it refuses."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from fork_server import start_lrnn

from lrnn import sbatch
from lrnn.cli import main
from lrnn.pretrain.checkpoint.format import manifest_text, seal
from lrnn.pretrain.config import load_config
from lrnn.settings import dump

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/tiny.yaml")


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """`submit(*arguments, queue="")` runs it with `queue` as squeue's output.

    Returns (status, stdout, stderr, calls of sbatch).
    """
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()
    (stubs / "squeue").write_text(f'#!/bin/sh\ncat "{tmp_path}/queue"\n')
    refusal = 'if [ -n "$REFUSED" ]; then echo "sbatch: error: $REFUSED" >&2; exit 1; fi\n'
    (stubs / "sbatch").write_text(f'#!/bin/sh\n{refusal}echo "$@" >> "{calls}"; echo "4711;cluster"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)  # tiny.yaml names its files relative to it

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
    assert len(dict(options)) == len(options), "an option appears twice"
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


def test_in_a_container(submit, tmp_path):
    """bash reads from the script the words that were meant. A script that starts no container is refused."""
    (image := tmp_path / "my image.sif").touch()
    _, out, _, _ = submit("--gpus-per-node", "1", "--container", str(image), "--dry-run")
    script = out.partition("usage:")[0].rpartition("\nif ")[0] + '\nprintf "%s\\n" "${in_container[@]}"'
    words = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True).stdout.splitlines()
    assert words[:3] == ["apptainer", "exec", "--nv"] and words[-1] == str(image) and str(ROOT) in words
    (own := tmp_path / "own.sbatch").write_text("#!/bin/bash\n#SBATCH --nodes=1\nsrun lrnn pretrain\n")
    status, _, err, _ = submit("--gpus-per-node", "1", "--container", str(image), "--template", str(own))
    assert status == 2 and "--template starts no container: write srun" in err
    status, _, err, calls = submit("--gpus-per-node", "1", "--container", "gone.sif")
    assert status == 2 and calls == [] and "--container gone.sif is not a file" in err


def test_on_cpu_there_is_one_task_per_node(submit):
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
    assert f"my run already has job 12 ({state}, BeginTime)" in err and "scancel 12" in err


def test_other_jobs_do_not_matter(submit, tmp_path):
    """They belong to another run, or to this one but have ended."""
    queue = f"11|RUNNING|None|lrnn run_dir={tmp_path}/my run 2\n12|FAILED|None|lrnn run_dir={tmp_path}/my run\n"
    assert submit("--gpus-per-node", "2", queue=queue)[0] == 0


def test_lines_of_a_template_stay(submit, tmp_path):
    """Those between its options do too, and an option counts with a space in place of =, as sbatch reads it."""
    (own := tmp_path / "own.sbatch").write_text(
        "#!/bin/bash\n#SBATCH --time=1:00\n# why\n#SBATCH  --nodes 2\nmodule load x\n#SBATCH --requeue\nsrun lrnn\n"
    )
    _, out, _, _ = submit("--gpus-per-node", "1", "--template", str(own), "--dry-run")
    assert out.startswith(
        "#!/bin/bash\n#SBATCH --time=1:00\n# why\nmodule load x\n#SBATCH --requeue\n#SBATCH --job-name="
    )
    assert directives(out)["nodes"] == "2" and out.count("nodes") == 1 and "\nsrun lrnn\n" in out


def test_errors_are_reported_before_the_job_is_queued(submit, monkeypatch, tmp_path):
    (short := tmp_path / "short").write_text("#!/bin/bash\n#SBATCH -N 4\n#SBATCH --time=1\nsrun lrnn\n")
    (words := tmp_path / "words").write_text("#!/bin/bash\n#SBATCH --nodes=two\nsrun lrnn\n")
    for arguments, message in [
        (["--nodes", "0"], "--nodes 0 should be a number, at least 1"),
        (["--nodes", "3"], "global_batch_size"),
        (["--sbatch", "nodes=3"], "--sbatch nodes=3 cannot be set: use --nodes"),
        (["--sbatch", "3"], "--sbatch 3 should be a long option"),
        (["--template", "nowhere"], "--template nowhere cannot be read"),
        (["--template", sys.executable], f"--template {sys.executable} is not UTF-8 text"),
        (["--template", str(short)], "has the line '#SBATCH -N 4'; write its option in full, as #SBATCH --nodes=4"),
        (["--template", str(words)], "--nodes two should be a number, at least 1"),
        (["steps=x"], "steps"),
    ]:
        status, _, err, calls = submit(*arguments)
        assert status == 2 and calls == [] and message in err, (arguments, err)
    monkeypatch.setenv("REFUSED", "invalid partition specified: x")
    assert "sbatch failed: sbatch: error: invalid partition specified: x" in submit("--gpus-per-node", "2")[2]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "squeue is not found" in submit("--gpus-per-node", "2")[2]


def test_resume_is_announced_if_there_is_a_checkpoint(submit, tmp_path):
    (tmp_path / "my run/checkpoints/step-00000050").mkdir(parents=True)
    assert "resumes" in (out := submit("--gpus-per-node", "2")[1]) and "(step 50 of 200)" in out


def test_a_finished_run_is_not_submitted(submit, tmp_path):
    folder = tmp_path / "my run/checkpoints/step-00000200"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest_text(200, {}))
    status, _, err, calls = submit("--gpus-per-node", "2")
    assert status == 2 and calls == [] and "is finished" in err and "step 200 of 200" in err
    assert submit("--gpus-per-node", "2", "steps=300")[0] == 0


def test_a_changed_result_is_refused_before_the_job_is_queued(submit, tmp_path):
    folder = tmp_path / "my run/checkpoints/step-00000050"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(dump(load_config(ROOT / CONFIG, [f"run_dir={tmp_path}/my run"])))
    (folder / "manifest.json").write_text(manifest_text(50, {"run.yaml": seal(folder / "run.yaml")}))
    assert submit("--gpus-per-node", "2", "log.every=3")[0] == 0
    status, _, err, calls = submit("--gpus-per-node", "2", "optim.lr=0.5")
    assert status == 2 and calls == [] and "optim.lr = 0.003 (now 0.5), which changes the results; add --all" in err
    status, out, _, _ = submit("--gpus-per-node", "2", "optim.lr=0.5", "--allow-change")
    assert status == 0 and " optim.lr=0.5 --allow-change\n" in out


def test_two_commands_at_once_submit_one_job(submit, tmp_path):
    """This is the real race: one command's sbatch is slow, and squeue lists its job only when sbatch is done."""
    run, calls = tmp_path / "my run", tmp_path / "calls"
    (tmp_path / "queue").touch()
    (tmp_path / "bin/sbatch").write_text(
        f"#!/bin/sh\ncd '{tmp_path}'\necho called >> calls\n"
        "for i in $(seq 300); do [ -e go ] && break; sleep 0.1; done\n"
        f"echo '4711|PENDING|Priority|lrnn run_dir={run}' >> queue\necho 4711\n"
    )
    command = ["submit", CONFIG, f"run_dir={run}", "--gpus-per-node", "2"]
    outputs = [tmp_path / f"out-{i}" for i in range(2)]
    for output in outputs:
        output.touch()
    processes = [start_lrnn(command, output) for output in outputs]

    def both_are_there() -> bool:
        n_calls = len(calls.read_text().splitlines()) if calls.exists() else 0
        return n_calls + sum("waiting for it" in output.read_text() for output in outputs) == 2

    try:
        deadline = time.monotonic() + 60
        while not both_are_there():
            assert time.monotonic() < deadline and None in [p.exitcode for p in processes], [
                o.read_text() for o in outputs
            ]
            time.sleep(0.05)
        (tmp_path / "go").touch()
        for process in processes:
            process.join(60)
    finally:
        (tmp_path / "go").touch()
        for process in processes:
            process.kill()
    statuses = [process.exitcode for process in processes]
    assert sorted(statuses) == [0, 2] and calls.read_text() == "called\n"
    first, second = (outputs[statuses.index(status)].read_text() for status in (0, 2))
    assert "submitted job 4711" in first and "waiting" not in first
    assert f"another lrnn submit of {run} is running; waiting for it up to 60 s" in second
    assert "my run already has job 4711 (PENDING, Priority)" in second


def test_a_command_that_hangs_does_not_let_a_second_job_through(submit, tmp_path, monkeypatch):
    monkeypatch.setattr(sbatch, "LOCK_WAIT_S", 0.2)
    run = tmp_path / "my run"
    run.mkdir()
    with FileLock(run / ".submit.lock"):
        status, _, err, calls = submit("--gpus-per-node", "2")
        assert status == 2 and calls == [] and "another lrnn submit is still running after 0.2 s" in err
        assert [p.name for p in run.iterdir()] == [".submit.lock"]
        assert submit("--gpus-per-node", "2", "--dry-run")[0] == 0, "--dry-run submits nothing and needs no lock"
    assert submit("--gpus-per-node", "2")[0] == 0
