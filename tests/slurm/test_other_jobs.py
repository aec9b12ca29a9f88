"""The batch scripts of corpora and evaluations on a real SLURM."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running_job import ROOT

from lrnn.eval.suites.collect import collect


@pytest.fixture
def sbatch(slurm, tmp_path):
    """`sbatch(*arguments, path=None)` submits a script in `tmp_path`, and returns the job. `path` precedes PATH."""

    def submit(*arguments: str, path: Path | None = None) -> str:
        folders = [*([path] if path else []), Path(sys.executable).parent, slurm.env["PATH"]]
        env = {**slurm.env, "PATH": ":".join(map(str, folders)), "PYTHONPATH": str(ROOT)}
        command = ["sbatch", "--parsable", *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def wait_until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SLOW_LRNN = f"""\
#!/usr/bin/env bash
# Does nothing when it is started first, so that the signal finds it at work, and is lrnn after that.
if mkdir started; then sleep 600; fi
exec {sys.executable} -m lrnn.cli "$@"
"""


def test_corpus_job_resumes_after_its_time_limit(slurm, sbatch, tmp_path):
    """The signal of the time limit puts the job back into the queue, and the second start completes the corpus."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/lrnn").write_text(SLOW_LRNN)
    (tmp_path / "bin/lrnn").chmod(0o755)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(f"document {i} of a small corpus\n" * 20)
    options = ["--include", "*.txt", "--train-tokenizer", "300", "--out", "corpus"]
    size = ["--cpus-per-task=1", "--time=5", "--output=corpus.log"]
    job = sbatch(*size, str(ROOT / "slurm/corpus.sbatch"), "text", *options, path=tmp_path / "bin")
    wait_until((tmp_path / "started").exists)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does
    wait_until(lambda: "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", job))
    assert "Restarts=1 " in slurm.run("scontrol", "show", "job", job)
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] == 20
    log = (tmp_path / "corpus.log").read_text()
    assert log.count("goes back into the queue") == 1 and log.count("wrote corpus in") == 1


LRNN = """\
#!/usr/bin/env bash
# Replaces lrnn, which takes minutes: exports a file, and says what it was asked to evaluate.
echo "$*" >> calls
case $1 in
    export) mkdir -p "$3" && cp "$2/weights" "$3" ;;
    eval)
        [ "$(cat "$2/weights")" != broken ] || exit 3
        mkdir -p "$6"
        row='{"task": "'$4'", "metric": "acc", "filter": "none", "value": '$(cat "$2/weights")', "stderr": null}'
        model='{"path": "'$2'", "training": {"step": '$(cat "$2/weights")'}, "weights_sha256": {}}'
        echo '{"model": '$model', "limit": null, "metrics": ['$row']}' > "$6/results.json" ;;
esac
"""


def test_an_array_of_checkpoints_and_suites(slurm, sbatch, tmp_path):
    """Every pair is evaluated once. The second submission does only what failed. One table shows them all."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/lrnn").write_text(LRNN)
    (tmp_path / "bin/lrnn").chmod(0o755)
    weights = [tmp_path / f"my run/checkpoints/step-0000000{step}/weights" for step in (1, 2)]
    for step, file in enumerate(weights, start=1):
        file.parent.mkdir(parents=True)
        file.write_text("broken" if step == 2 else "1")
    pairs = [f"{file.parent.relative_to(tmp_path)}\t{suite}\n" for file in weights for suite in ("fast", "code")]
    (tmp_path / "jobs.tsv").write_text("".join(pairs))
    cpu = ["--gpus=0", "--cpus-per-task=1", "--array=0-3", str(ROOT / "slurm/eval.sbatch"), "jobs.tsv"]

    def submit() -> list[str]:
        job = sbatch(*cpu, path=tmp_path / "bin")
        states = ["scontrol", "show", "job", job]
        wait_until(lambda: not slurm.run("squeue", "-h", "-j", job))
        return sorted(word for word in slurm.run(*states).split() if word.startswith("JobState="))

    assert submit() == ["JobState=COMPLETED"] * 2 + ["JobState=FAILED"] * 2
    weights[1].write_text("2")
    first = (tmp_path / "calls").read_text()
    assert submit() == ["JobState=COMPLETED"] * 4
    second = (tmp_path / "calls").read_text()[len(first) :].splitlines()
    assert len(second) == 4 and all("step-00000002" in call for call in second)  # two exports, two evaluations
    table = collect([tmp_path / "my run/eval"]).splitlines()
    assert table[2:] == ["| step-00000001 | 1 | 1.0000 | 1.0000 |", "| step-00000002 | 2 | 2.0000 | 2.0000 |"]
    assert len(list(tmp_path.glob("lrnn-eval-*.log"))) == 8
