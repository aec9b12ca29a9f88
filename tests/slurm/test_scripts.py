"""The batch scripts, run by bash with stubs of SLURM's commands: what they start, and when they requeue."""

import os
import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
NAMES = ("train", "eval", "corpus")


@pytest.fixture
def sbatch(tmp_path):
    """`sbatch(name, *arguments, srun_status=0, **environment)` runs a script and returns (status, calls, output).

    A call of a stubbed command is a list of its name and arguments.
    """
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    stubs.mkdir()
    for name in ("srun", "scontrol", "lrnn"):
        # srun runs nothing: its arguments say what it would have run, with one argument per line.
        stub = f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" >> "{calls}"; printf "\\n" >> "{calls}"\n'
        (stubs / name).write_text(stub + ('exit "$SRUN_STATUS"\n' if name == "srun" else ""))
        (stubs / name).chmod(0o755)

    def run(name: str, *arguments: str, srun_status: int = 0, **environment: str):
        calls.unlink(missing_ok=True)
        env = {"PATH": f"{stubs}:{os.environ['PATH']}", "SRUN_STATUS": str(srun_status), "SLURM_JOB_ID": "4711"}
        done = subprocess.run(
            ["bash", str(SLURM / f"{name}.sbatch"), *arguments],
            env={**env, **environment}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        made = calls.read_text().split("\n")[:-1] if calls.exists() else []
        return done.returncode, [call.split("\0")[:-1] for call in made], done.stdout + done.stderr

    return run


@pytest.mark.parametrize("name", [*NAMES, "collect"])
def test_syntax(name):
    subprocess.run(["bash", "-n", str(SLURM / f"{name}.sbatch")], check=True)


@pytest.mark.parametrize("folder", [None, "/scratch/kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_stay_where_the_user_has_them(sbatch, tmp_path, name, folder):
    # A folder for each job would make every job compile all kernels.
    (tmp_path / "jobs.tsv").write_text("model\tquick\n")
    (tmp_path / "bin" / "srun").write_text(f'#!/bin/bash\necho "${{TRITON_CACHE_DIR-unset}}" > {tmp_path}/seen')
    environment = {"SLURM_CPUS_PER_TASK": "2", "SLURM_ARRAY_TASK_ID": "0"}
    environment |= {} if folder is None else {"TRITON_CACHE_DIR": folder}
    arguments = {"train": "run.yaml", "eval": "jobs.tsv", "corpus": "text"}
    status, _, output = sbatch(name, arguments[name], **environment)
    assert (status, (tmp_path / "seen").read_text()) == (0, f"{folder or 'unset'}\n"), output


def directives(name: str) -> dict[str, str]:
    """Return the #SBATCH lines that SLURM would read: those before the first command."""
    found = {}
    for line in (SLURM / f"{name}.sbatch").read_text().splitlines():
        if line.startswith("#SBATCH "):
            key, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[key] = value
        elif line and not line.startswith("#"):
            return found
    raise AssertionError("no command")


def test_directives():
    train = directives("train")
    # Without "B:" the signal goes to the tasks, not to the shell.
    assert re.fullmatch(r"USR1@\d+", train["signal"]) and int(train["signal"][5:]) >= 120
    assert "requeue" in train and train["open-mode"] == "append"
    assert train["ntasks-per-node"] == train["gpus-per-node"]  # one task per GPU
    corpus = directives("corpus")
    assert "requeue" in corpus and re.fullmatch(r"B:USR1@\d+", corpus["signal"]) and corpus["open-mode"] == "append"
    job = directives("eval")
    assert "requeue" in job and job["ntasks"] == "1" and "%a" in job["output"]  # a log of its own for each array task


def test_train_starts_one_run(sbatch):
    status, calls, _ = sbatch("train", "configs/my run.yaml", "run_dir=runs/with space", "data.corpora=[{path: a b}]")
    assert status == 0
    ((command, *arguments),) = calls
    assert command == "srun"
    split = arguments.index("lrnn")
    assert arguments[split:] == [
        "lrnn", "pretrain", "configs/my run.yaml", "run_dir=runs/with space", "data.corpora=[{path: a b}]",
    ]  # fmt: skip
    # A task that ends with 75 before the others must not cause them to be killed.
    assert "--kill-on-bad-exit=0" in arguments[:split]


@pytest.mark.parametrize("words", [None, "apptainer exec --nv lrnn.sif"])
@pytest.mark.parametrize("name", [*NAMES, "collect"])
def test_commands_run_in_a_container_if_asked_to(sbatch, tmp_path, name, words):
    """A variable called `container`, which container runtimes set, asks for nothing."""
    (tmp_path / "jobs.tsv").write_text("runs/a/checkpoints/step-00000010\tquick\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/results.json").touch()
    arguments = {"train": ["run.yaml"], "eval": ["jobs.tsv"], "corpus": ["text"], "collect": [".", "a"]}[name]
    variables = {"SLURM_CPUS_PER_TASK": "2", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
    variables |= {"container": "podman"} | ({} if words is None else {"LRNN_CONTAINER": words})
    status, calls, output = sbatch(name, *arguments, **variables)
    assert status == 0, output
    runs = [
        [word for word in call[1:] if not word.startswith("--kill") and word != "--wait=60"]
        for call in calls
        if call[0] == "srun"
    ]
    assert len(runs) == {"train": 1, "eval": 2, "corpus": 1, "collect": 2}[name]
    assert all(" ".join(run).startswith("lrnn " if words is None else f"{words} lrnn ") for run in runs)
    asked = ["scontrol", "show", "hostnames", "n[1-2]"]  # SLURM's commands are not in the image
    assert (asked in calls) == (name == "train" and words is not None)


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_train_passes_the_status_on(sbatch, status):
    found, calls, _ = sbatch("train", "run.yaml", srun_status=status)
    assert found == status and [call[0] for call in calls] == ["srun"]


@pytest.mark.parametrize("status", [75, 138, 143])  # stopped with a checkpoint; SIGUSR1, SIGTERM before the first step
def test_train_requeues_a_stopped_run(sbatch, status):
    found, calls, output = sbatch("train", "run.yaml", srun_status=status)
    assert found == status
    assert calls[1:] == [["scontrol", "requeue", "4711"]]
    assert "4711" in output


@pytest.mark.parametrize("status", [0, 2])
def test_corpus_takes_the_cores_of_the_job(sbatch, status):
    found, calls, _ = sbatch("corpus", "my text", "--out", "c", srun_status=status, SLURM_CPUS_PER_TASK="16")
    assert found == status
    assert calls == [["srun", "lrnn", "corpus", "--processes", "16", "my text", "--out", "c"]]


@pytest.mark.parametrize("name", [*NAMES, "collect"])
def test_missing_argument(sbatch, name):
    status, calls, output = sbatch(name, SLURM_ARRAY_TASK_ID="0")
    assert status == 2 and calls == []
    assert "usage: sbatch" in output and f"slurm/{name}.sbatch" in output


@pytest.fixture
def jobs(tmp_path):
    """Return a table of three jobs. Its last line has no newline, as some editors leave it."""
    file = tmp_path / "my jobs.tsv"
    file.write_text("models/a\tfast\nmodels/b c\tcode_math\nmodels/d\tfast")
    return file


@pytest.mark.parametrize(
    ("task", "model", "suite"), [(0, "models/a", "fast"), (1, "models/b c", "code_math"), (2, "models/d", "fast")]
)
def test_eval_takes_its_line(sbatch, jobs, task, model, suite):
    status, calls, _ = sbatch("eval", str(jobs), "--limit", "5 0", SLURM_ARRAY_TASK_ID=str(task))
    assert status == 0
    assert calls == [
        ["srun", "lrnn", "eval", model, "--suite", suite, "--out", f"{model}/eval/{suite}", "--limit", "5 0"]
    ]


def test_eval_of_a_checkpoint(sbatch, tmp_path):
    """It is exported first, but not into the checkpoint. Results are beside the checkpoints, one folder per step."""
    (tmp_path / "jobs.tsv").write_text("runs/a b/checkpoints/step-00000010\tfast\n")
    disk = tmp_path / "disk"
    disk.mkdir()
    status, calls, _ = sbatch("eval", "jobs.tsv", "--limit", "5", SLURM_ARRAY_TASK_ID="0", TMPDIR=str(disk))
    assert status == 0
    (export, evaluate), out = calls, "runs/a b/eval/step-00000010/fast"
    assert export[:4] == ["srun", "lrnn", "export", "runs/a b/checkpoints/step-00000010"]
    exported = Path(export[4])
    assert exported.name == "step-00000010" and exported.is_relative_to(disk) and not list(disk.iterdir())
    assert evaluate == ["srun", "lrnn", "eval", str(exported), "--suite", "fast", "--out", out, "--limit", "5"]
    (tmp_path / out).mkdir(parents=True)
    (tmp_path / out / "results.json").write_text("{}")
    assert sbatch("eval", "jobs.tsv", SLURM_ARRAY_TASK_ID="0")[1] == []


def test_eval_skips_finished_results(sbatch, jobs, tmp_path):
    results = tmp_path / "models/b c/eval/code_math/results.json"
    results.parent.mkdir(parents=True)
    results.write_text("")  # begun, but not finished
    assert len(sbatch("eval", str(jobs), SLURM_ARRAY_TASK_ID="1")[1]) == 1
    results.write_text("{}")
    status, calls, output = sbatch("eval", str(jobs), SLURM_ARRAY_TASK_ID="1")
    assert status == 0 and calls == [] and "exists already" in output
    assert len(sbatch("eval", str(jobs), SLURM_ARRAY_TASK_ID="0")[1]) == 1


def test_eval_fails_if_the_evaluation_fails(sbatch, jobs):
    assert sbatch("eval", str(jobs), srun_status=3, SLURM_ARRAY_TASK_ID="0")[0] == 3


def test_eval_of_tasks(sbatch, tmp_path):
    """The third column says what to run, and the second where its results go."""
    (tmp_path / "jobs.tsv").write_text("models/a\tpiqa+sciq-2-shot\t--tasks=piqa,my tasks/sciq.yaml\n")
    _, calls, _ = sbatch("eval", "jobs.tsv", "--num-fewshot", "2", SLURM_ARRAY_TASK_ID="0")
    out = "models/a/eval/piqa+sciq-2-shot"
    what = ["--tasks=piqa,my tasks/sciq.yaml", "--out", out, "--num-fewshot", "2"]
    assert calls == [["srun", "lrnn", "eval", "models/a", *what]]


def test_collect(sbatch, tmp_path):
    """A table and a page of the folders that have results are written. The old table stays if there are none."""
    (tmp_path / "a b/eval/fast").mkdir(parents=True)
    (tmp_path / "c/eval").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/table.md").write_text("old")
    status, calls, output = sbatch("collect", "out", "a b/eval", "c/eval")
    assert status == 1 and calls == [] and "no results below a b/eval c/eval" in output
    (tmp_path / "a b/eval/fast/results.json").touch()
    assert sbatch("collect", "out", "a b/eval", "c/eval", srun_status=3)[0] == 3
    assert (tmp_path / "out/table.md").read_text() == "old"
    status, calls, _ = sbatch("collect", "out", "a b/eval", "c/eval")
    collect = ["srun", "lrnn", "eval", "--collect", "a b/eval"]
    assert status == 0 and calls == [collect, [*collect, "--html", "out/results.html"]]
    assert (tmp_path / "out/table.md").read_text() == ""  # the stub of srun prints nothing


@pytest.mark.parametrize("content", ["models/a\tfast\n", "models/a\tfast\n\n", "models/a\tfast\nmodels/b\n"])
def test_eval_without_a_line(sbatch, tmp_path, content):
    """Refuse a task number beyond the table, an empty line, and a line without a suite."""
    (tmp_path / "jobs.tsv").write_text(content)
    status, calls, output = sbatch("eval", str(tmp_path / "jobs.tsv"), SLURM_ARRAY_TASK_ID="1")
    assert status == 2 and calls == []
    assert "line 2 of" in output and "jobs.tsv" in output
