"""`lrnn submit --eval` with stubs of SLURM's commands: the table, the array, the job that collects, the refusals."""

import os
import sys
import time
from pathlib import Path

import pytest
from filled_scripts import arguments, directives

from lrnn.cli import main
from lrnn.pretrain.checkpoint.format import manifest_text


@pytest.fixture
def submit(fake_slurm, capsys):
    """`submit(*arguments)` runs it in `tmp_path`, where the stubs have their files, and returns (status, out, err)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["submit", *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def run_dir(submit, tmp_path) -> Path:
    """A run with checkpoints of the steps 10, 20 and 30, and one of step 40 that lacks its manifest."""
    for step in (10, 20, 30, 40):
        folder = tmp_path / f"my run/checkpoints/step-{step:08}"
        folder.mkdir(parents=True)
        if step < 40:
            (folder / "manifest.json").write_text(manifest_text(step, {}))
    return tmp_path / "my run"


def lines(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()]


def finish(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "results.json").write_text("{}")


OPTIONS = ["--max-concurrent", "4", "--time", "1:00:00", "--sbatch", "partition=h200", "--sbatch", "mem=64G"]


def test_an_array_and_a_job_that_collects(submit, run_dir, tmp_path):
    what = ["--suite", "fast,quick", *OPTIONS, "--gpus-per-node", "2"]
    status, out, _ = submit("--eval", "my run", *what, "--", "--bos", "never", "--limit", "50")
    home = run_dir / "eval/slurm"
    steps = [str(run_dir / f"checkpoints/step-{step:08}") for step in (10, 20, 30)]
    pairs = [(f"{suite}-bos-never-first-50", f"--suite={suite}") for suite in ("fast", "quick")]
    assert status == 0 and lines(home / "jobs-1.tsv") == [[step, *pair] for step in steps for pair in pairs]
    array, collect = directives(home / "eval-1.sbatch"), directives(home / "collect-1.sbatch")
    assert (array["array"], array["time"], array["partition"], array["mem"]) == ("0-5%4", "1:00:00", "h200", "64G")
    assert (array["gpus-per-node"], array["nodes"], "gpus" in array) == ("2", "1", False)
    assert array["output"] == f"{home}/%A-%a.log" and array["chdir"] == str(tmp_path) and "requeue" in array
    assert arguments(home / "eval-1.sbatch") == [str(home / "jobs-1.tsv"), "--bos", "never", "--limit", "50"]
    assert collect["partition"] == "h200" and not {"mem", "array", "gpus", "gpus-per-node"} & collect.keys()
    assert arguments(home / "collect-1.sbatch") == [str(run_dir / "eval")] * 2
    assert Path("calls").read_text().splitlines() == [
        f"--parsable {home}/eval-1.sbatch",
        f"--parsable --dependency=afterany:4711 {home}/collect-1.sbatch",
    ]
    assert "step-00000040 is not a whole checkpoint" in out
    assert "submitted job 4711: 6 to evaluate, 0 with results, 0 queued" in out and "submitted job 4712" in out


def test_submitting_again_submits_what_is_left(submit, run_dir):
    """What has results or is queued is left out. A task of the array that has failed is not queued any more."""
    finish(run_dir / "eval/step-00000010/fast")
    command = ["--eval", "my run", "--suite", "fast"]
    assert "2 to evaluate, 1 with results, 0 queued" in submit(*command)[1]
    status, out, _ = submit(*command)
    assert status == 0 and "nothing to submit: 1 with results, 2 queued or running" in out
    queue = Path("queue").read_text()
    Path("queue").write_text(queue.replace("4711_1|PENDING", "4711_1|FAILED"))
    assert "1 to evaluate, 1 with results, 1 queued" in submit(*command)[1]
    assert [line[0][-2:] for line in lines(run_dir / "eval/slurm/jobs-2.tsv")] == ["30"]
    # Another suite is another pair. Trainings and tables that are gone do not matter.
    assert "3 to evaluate" in submit("--eval", "my run", "--suite", "quick")[1]
    Path("queue").write_text(f"9|RUNNING|None|lrnn run_dir={run_dir}\n8|RUNNING|None|lrnn eval=/nowhere/jobs-1.tsv\n")
    assert "2 to evaluate, 1 with results, 0 queued" in submit(*command)[1]
    for step in (20, 30):
        finish(run_dir / f"eval/step-000000{step}/fast")
    assert "nothing to submit: 3 with results" in submit(*command)[1]


def test_tasks_have_a_result_folder_of_their_own(submit, run_dir, monkeypatch):
    """They are one evaluation together, and a second --tasks is another. The names are those of `lrnn eval`."""
    monkeypatch.setattr("lrnn.eval.suites.task_objects.choose", lambda *names, **options: None)
    command = ["--eval", "my run", "--checkpoints", "last", "--suite", "fast", "--tasks", "piqa,sciq", "arc_easy"]
    assert submit(*command, "--tasks", "mmlu")[0] == 0
    found = [line[1:] for line in lines(run_dir / "eval/slurm/jobs-1.tsv")]
    assert found == [
        ["fast", "--suite=fast"],
        ["piqa+sciq+arc_easy", "--tasks=piqa,sciq,arc_easy"],
        ["mmlu", "--tasks=mmlu"],
    ]


@pytest.mark.parametrize(
    ("which", "steps"), [("all", [10, 20, 30]), ("last", [30]), ("every:20", [20]), ("30,10,30", [10, 30])]
)
def test_checkpoints(submit, run_dir, which, steps):
    status, out, _ = submit("--eval", "my run", "--suite", "fast", "--checkpoints", which, "--dry-run")
    named = [line.split("\t")[0] for line in out.splitlines() if line.endswith("\tfast\t--suite=fast")]
    assert status == 0 and named == [f"# {run_dir}/checkpoints/step-{step:08}" for step in steps]
    assert not (run_dir / "eval").exists() and not Path("calls").exists()


def test_checkpoints_and_model_folders(submit, run_dir, tmp_path):
    """Everything is one array, and its table and the collected results are at the first folder."""
    model = tmp_path / "exports/a"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    for name in ("tokenizer_config.json", "model.safetensors"):
        (model / name).touch()
    one = run_dir / "checkpoints/step-00000020"
    status, _, _ = submit("--eval", "exports/a", str(one), "exports/a/", "--suite", "fast")
    assert status == 0
    home = model / "eval/slurm"
    assert [line[0] for line in lines(home / "jobs-1.tsv")] == [str(model), str(one)]
    assert arguments(home / "collect-1.sbatch") == [str(p / "eval") for p in (model, model, run_dir)]
    assert "and --eval names no run" in submit("--eval", "exports/a", "--suite", "fast", "--checkpoints", "last")[2]
    finish(model / "eval/fast")
    Path("queue").write_text("")
    assert "1 to evaluate, 1 with results" in submit("--eval", "exports/a", str(one), "--suite", "fast")[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--suite", "fsat"], "unknown suite 'fsat'; did you mean fast?"),
        (["--suite", "code_math"], "add --allow-code-execution"),
        ([], "name what to run: --suite NAME,NAME or --tasks TASK,TASK"),
        (["--suite", "fast", "--checkpoints", "newest"], "--checkpoints newest should be all, last, every:N, or steps"),
        (["--suite", "fast", "--checkpoints", "every:0"], "--checkpoints every:0 should be"),
        (["--suite", "fast", "--checkpoints", "every:7"], "no checkpoint at a multiple of 7; it has 10, 20, 30"),
        (["--suite", "fast", "--checkpoints", "10,40"], "has no whole checkpoint of step 40; it has 10, 20, 30"),
        (["--suite", "fast", "--max-concurrent", "0"], "--max-concurrent 0 should be a number, at least 1"),
        (["--suite", "fast", "--max-concurrent", "²"], "--max-concurrent ² should be a number, at least 1"),
        (["--suite", "fast", "--gpus-per-node", "-1"], "--gpus-per-node -1 should be a number, at least 0"),
        (["--suite", "fast", "--nodes", "2"], "--nodes is for training"),
        (["--suite", "fast", "--sbatch", "array=1"], "--sbatch array=1 cannot be set: the table of jobs sets it"),
        (["--suite", "fast", "--template", "nowhere"], "--template nowhere cannot be read"),
        (
            ["--suite", "fast", "--", "--limt", "5"],
            "options after --: unrecognized arguments: --limt; `lrnn eval",
        ),
        (["--suite", "fast", "--", "--batch-size", "x"], "options after --: argument --batch-size"),
        (["--suite", "fast", "--", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--suite", "fast", "--", "--out", "x"], "options after --: --out cannot be given: results go to DIR/eval"),
        (["--suite", "fast", "--", "runs/b"], "options after --: runs/b cannot be given: name models with --eval"),
        (["--suite", "fast", "--", "--num-fewshot", "2"], "--num-fewshot: a suite has a fixed protocol"),
        (["--suite", "fast", "--", "--heldout", "nowhere"], "--heldout nowhere does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_submitted(submit, run_dir, command, message):
    status, _, err = submit("--eval", "my run", *command)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert not Path("calls").exists() and not (run_dir / "eval").exists()


def test_folders_that_are_not_models_are_refused(submit, tmp_path):
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    for name, message in {
        "nowhere": "--eval nowhere is not a folder",
        "bin": "--eval bin is neither a run with checkpoints, nor a checkpoint, nor a model folder",
        "empty": "--eval empty: the run has no whole checkpoint yet",
        "checkpoints/step-00000010": "is not a whole checkpoint: a file of it is missing or truncated",
    }.items():
        status, _, err = submit("--eval", name, "--suite", "fast")
        assert status == 2 and message in err and err.count("\n") == 1
    assert "--suite is for evaluations" in submit("run.yaml", "--suite", "fast")[2]
    assert "name the YAML file of a run" in submit()[2]


def test_slurm_that_is_missing_or_refuses(submit, run_dir, monkeypatch, tmp_path):
    command = ["--eval", "my run", "--suite", "fast"]
    monkeypatch.setenv("REFUSE", "eval-1.sbatch")
    assert submit(*command)[::2] == (2, "lrnn: error: sbatch failed: sbatch: error: invalid partition\n")
    assert not Path("calls").exists()
    # An array without the job that collects is not left behind.
    monkeypatch.setenv("REFUSE", "collect-")
    status, _, err = submit(*command)
    assert status == 2 and "this was the job that collects, and the array 4711 is cancelled" in err
    assert Path("cancelled").read_text() == "4711\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "squeue is not found" in submit(*command)[2]


def test_a_folder_that_cannot_be_written(submit, run_dir):
    (run_dir / "eval").write_text("a file, because root may write into every folder")
    status, _, err = submit("--eval", "my run", "--suite", "fast")
    assert status == 2 and f"the folder of results {run_dir}/eval cannot be written" in err
    assert not Path("calls").exists()


LRNN = f"""\
#!{sys.executable}
# Replaces lrnn in the jobs: exports a file, and scores a model by the number in it. It collects with the true lrnn.
import json, os, shutil, sys
from pathlib import Path

command, first, *others = sys.argv[1:]
if first == "--collect":
    os.execv(sys.executable, [sys.executable, "-m", "lrnn.cli", *sys.argv[1:]])
if command == "export":
    shutil.copytree(first, others[0])
    sys.exit()
step = int((Path(first) / "weights").read_text())
if step == 2:
    sys.exit(3)
what, out = others[0], Path(others[2])
row = dict(task=what.removeprefix("--suite="), metric="acc", filter="none", value=step / 10, stderr=0.1, n=9, shots=0)
row["higher_is_better"] = True
results = dict(suite=what, limit=None, metrics=[row], by_length=[], environment={{}})
results["model"] = dict(path=first, training=dict(step=step), weights_sha256={{}})
results["settings"] = dict(max_length=9, dtype="float32")
out.mkdir(parents=True)
sample = dict(doc_id=0, doc_hash="0", doc={{}}, target="1", filter="none", acc=step / 10, filtered_resps=["1"])
sample["arguments"] = dict(gen_args_0=dict(arg_0="question", arg_1="answer"))
(out / f"samples_{{row['task']}}.jsonl").write_text(json.dumps(sample) + "\\n")
(out / "results.json").write_text(json.dumps(results))
"""


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="a minute of SLURM; set LRNN_TORTURE=1")
def test_on_a_cluster(slurm, enter_cluster, tmp_path, capsys):
    """The array runs, one checkpoint fails, the rest is collected. What is queued or done is not submitted again."""
    enter_cluster(slurm, LRNN)
    for step in (1, 2, 3):
        folder = tmp_path / f"my run/checkpoints/step-0000000{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        (folder / "manifest.json").write_text(manifest_text(step, {}))
    command = ["submit", "--eval", "my run", "--suite", "fast", "quick", "--max-concurrent", "1"]
    command += ["--gpus-per-node", "0", "--sbatch", "cpus-per-task=1"]

    def submit(*arguments: str) -> str:
        assert main([*command, *arguments]) == 0
        return capsys.readouterr().out

    first = submit("--sbatch", "begin=now+10")
    assert "6 to evaluate" in first
    assert "nothing to submit: 0 with results, 6 queued or running" in submit()
    deadline = time.monotonic() + 300
    while slurm.run("squeue", "-h"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    results = tmp_path / "my run/eval"
    logs = "".join(log.read_text() for log in (results / "slurm").glob("*.log"))
    assert (results / "table.md").is_file(), logs
    table = (results / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[2:] if row] == ["step-00000001", "step-00000003"], logs
    assert (results / "results.html").read_text().count("step-00000003") > 0
    assert len(list((results / "slurm").glob("*-[0-9].log"))) == 6
    assert "2 to evaluate, 4 with results, 0 queued" in submit()
