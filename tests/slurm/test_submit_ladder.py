"""`lrnn ladder --submit` with stubs of SLURM's commands: arrays by number of GPUs, the report, what is left out."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filled_scripts import arguments, directives
from ladder_results import result_of
from tiny_ladder import NAMES, write_ladder

from lrnn.cli import main
from lrnn.ladder.cells import Cell, load_ladder
from lrnn.ladder.results import write_result
from lrnn.run_lock import RunLock

ROOT = Path(__file__).parents[2]
MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 32, "vocab_size": 64}
SMALL = [f"small/attention/none/1K/seed-{seed}" for seed in (0, 1)]
LARGE = [f"large/delta/{range_}/1K/seed-0" for range_ in ("negative", "positive")]


@pytest.fixture
def ladder(fake_slurm, monkeypatch) -> Path:
    """A ladder of four cells, of which two take two GPUs each."""
    size = {"model": MODEL, "tokens": [1000], "lr": 1e-3}
    content = {
        "out": "my out",
        "run": {
            "data": {"seq_len": 32, "corpora": [{"path": "code"}]}, "global_batch_size": 2, "micro_batch_size": 1,
            "schedule": {"name": "wsd"},
        },
        "sizes": {"small": size, "large": size | {"gpus": 2}},
        "arms": {"delta": {"model": {"mixer": "deltanet"}}, "attention": {"model": {"mixer": "attention"}}},
        "grids": [
            {"sizes": ["large"], "arms": ["delta"], "seeds": [0]},
            {"sizes": ["small"], "arms": ["attention"], "seeds": [0, 1]},
        ],
    }  # fmt: skip
    monkeypatch.setattr(Cell, "corpora", lambda cell, if_here=False: {"code": "a"})
    (fake_slurm / "ladder.yaml").write_text(yaml.safe_dump(content))
    return fake_slurm / "ladder.yaml"


@pytest.fixture
def submit(ladder, capsys):
    """`submit(*arguments)` returns (status, out, err)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["ladder", "ladder.yaml", "--submit", *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def test_arrays_and_a_report(submit, tmp_path):
    status, out, _ = submit(
        "--time", "1:00:00", "--sbatch", "partition=h200", "--sbatch", "mem=9G", "--max-concurrent=3"
    )
    home = tmp_path / "my out/slurm"
    assert status == 0 and "submitted job 4711: 2 cells with 1 GPUs each" in out and "0 with results, 0 queued" in out
    assert (home / "cells-on-1-1.txt").read_text().splitlines() == SMALL
    assert (home / "cells-on-2-1.txt").read_text().splitlines() == LARGE
    one, two = (directives(home / f"cells-on-{gpus}-1.sbatch") for gpus in (1, 2))
    assert (one["gpus-per-node"], two["gpus-per-node"], "gpus" in one) == ("1", "2", False)
    assert (one["array"], one["time"], one["partition"], one["mem"]) == ("0-1%3", "1:00:00", "h200", "9G")
    assert one["output"] == f"{home}/%A-%a.log" and "requeue" in one and one["signal"] == "USR1@300"
    settings = str(home / "ladder-1.yaml")
    assert arguments(home / "cells-on-1-1.sbatch") == [str(home / "cells-on-1-1.txt"), settings]
    report = directives(home / "report-1.sbatch")
    assert report["partition"] == "h200" and not {"mem", "array", "gpus-per-node"} & report.keys()
    assert arguments(home / "report-1.sbatch") == [settings]
    assert Path("calls").read_text().splitlines() == [
        f"--parsable {home}/cells-on-1-1.sbatch",
        f"--parsable {home}/cells-on-2-1.sbatch",
        f"--parsable --dependency=afterany:4711:4712 {home}/report-1.sbatch",
    ]


def test_jobs_read_the_ladder_as_it_was_submitted(submit, ladder, tmp_path, monkeypatch):
    """Whatever happens to the file meanwhile, and wherever they start."""
    submit()
    _, before = load_ladder(ladder)
    ladder.unlink()
    monkeypatch.chdir("/")
    _, after = load_ladder(tmp_path / "my out/slurm/ladder-1.yaml")
    assert [cell.name for cell in after] == [cell.name for cell in before]
    assert [cell.settings for cell in after] == [cell.settings for cell in before]
    assert after[0].run_dir == tmp_path / "my out/runs" / after[0].name
    assert after[0].config.data.corpora[0].path == str(tmp_path / "code")


def test_submitting_again_submits_what_is_left(submit, ladder):
    """What has results or is queued is left out. A task that has failed is not queued any more."""
    cells = {cell.name: cell for cell in load_ladder(ladder)[1]}
    write_result(cells[SMALL[0]].result_folder, result_of(cells[SMALL[0]]))
    assert "1 with results, 0 queued" in submit("--cells", "small/*")[1]
    status, out, _ = submit("--cells", "small/*")
    assert status == 0 and "nothing to submit: 1 with results, 1 queued or running" in out
    status, out, _ = submit()
    assert "2 cells with 2 GPUs each" in out and "1 with results, 1 queued" in out and "1 GPUs" not in out
    queue = Path("queue").read_text()
    Path("queue").write_text(
        queue.replace("_1|PENDING", "_1|FAILED") + "9|RUNNING|None|lrnn ladder=/nowhere/slurm/x.txt\n"
    )
    status, out, _ = submit()
    assert "1 cells with 2 GPUs each" in out and Path("my out/slurm/cells-on-2-3.txt").read_text() == f"{LARGE[1]}\n"


def test_a_dry_run_submits_nothing(submit):
    status, out, _ = submit("--dry-run", "--redo")
    assert status == 0 and not Path("my out").exists() and not Path("calls").exists()
    assert out.count("#SBATCH --array=0-1") == 2 and all(f"# {name}\n" in out for name in SMALL + LARGE)
    assert out.count("ladder-1.yaml' --redo") == 2 and "# 4 to run, 0 with results; not submitted" in out


def test_gpus_of_the_command_line_are_those_of_all_cells(submit, tmp_path):
    status, *_ = submit("--gpus-per-node", "0")
    home = tmp_path / "my out/slurm"
    assert status == 0 and (home / "cells-on-0-1.txt").read_text().splitlines() == LARGE + SMALL
    assert not {"gpus", "gpus-per-node"} & directives(home / "cells-on-0-1.sbatch").keys()
    assert directives(home / "cells-on-0-1.sbatch")["array"] == "0-3"


def test_a_refused_job_cancels_those_before_it(submit, monkeypatch):
    monkeypatch.setenv("REFUSE", "report-1")
    status, _, err = submit()
    assert status == 2 and "invalid partition" in err and "are cancelled: 4711, 4712" in err
    assert Path("cancelled").read_text() == "4711\n4712\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sbatch", "gpus=2"], "--sbatch gpus=2 cannot be set: use --gpus-per-node, or sizes.NAME.gpus"),
        (["--sbatch", "array=0-9"], "cannot be set: the cells that are left decide it"),
        (["--gpus-per-node", "two"], "--gpus-per-node two should be a number, at least 0"),
        (["--max-concurrent", "0"], "--max-concurrent 0 should be a number, at least 1"),
        (["--template", "nowhere"], "--template nowhere cannot be read"),
    ],
)
def test_wrong_options(submit, options, message):
    status, _, err = submit(*options)
    assert status == 2 and message in err and not Path("my out").exists()


def test_a_ladder_that_runs_here_is_not_submitted(submit, monkeypatch):
    monkeypatch.setattr("lrnn.run_lock.WAIT_S", 0.0)
    with RunLock(Path("my out").resolve(), "out"):
        assert "is in use by process" in submit()[2]
    assert not Path("calls").exists()


def run_script(name: str, *words: str, status: int = 0, **variables: str) -> tuple[int, list[str], str]:
    """Run a batch script with stubs of srun and scontrol. Return its status, their calls and the output."""
    for stub, code in {"srun": status, "scontrol": 0}.items():
        Path(f"bin/{stub}").write_text(f'#!/bin/sh\nprintf "%s\\n" "{stub} $*" >> script-calls\nexit {code}\n')
        Path(f"bin/{stub}").chmod(0o755)
    Path("script-calls").unlink(missing_ok=True)
    command = ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), *words]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    calls = Path("script-calls").read_text().splitlines() if Path("script-calls").exists() else []
    return done.returncode, calls, done.stdout + done.stderr


def test_the_batch_scripts(fake_slurm):
    """A task runs the cell of its line. One that a signal stopped goes back into the queue."""
    Path("cells.txt").write_text("\n".join(SMALL) + "\n")
    task = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "12"}
    words = ["cells.txt", "my ladder.yaml", "--redo"]
    call = f"srun lrnn ladder my ladder.yaml --redo --cell {SMALL[1]}"
    assert run_script("ladder", *words, **task)[:2] == (0, [call])
    assert run_script("ladder", *words, status=2, **task)[:2] == (2, [call])
    assert run_script("ladder", *words, status=75, **task)[:2] == (75, [call, "scontrol requeue 12"])
    status, calls, output = run_script("ladder", *words, **task | {"SLURM_ARRAY_TASK_ID": "2"})
    assert status == 2 and not calls and "line 3 of cells.txt should be the name of a cell" in output
    in_image = run_script("ladder", *words, **task, LRNN_CONTAINER="apptainer exec x.sif")
    assert in_image[1] == [call.replace("srun", "srun apptainer exec x.sif")]
    assert run_script("report", "my ladder.yaml")[1] == ["srun lrnn ladder my ladder.yaml --report"]
    for name in ("ladder", "report"):
        assert run_script(name)[0] == 2


LRNN = f"""\
#!/usr/bin/env bash
# Is lrnn, but a cell that is started first gets the signal of a time limit.
if [[ "$*" == *--cell* ]] && mkdir started 2> /dev/null; then exit 75; fi
exec {sys.executable} -m lrnn.cli "$@"
"""


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="minutes of SLURM; set LRNN_TORTURE=1")
def test_on_a_cluster(slurm, enter_cluster, tmp_path, capsys):
    """The cells run as tasks, one is requeued, and the report follows. What is queued is not submitted again."""
    enter_cluster(slurm, LRNN)
    command = ["ladder", str(write_ladder(tmp_path)), "--submit", "--cells", "*/attention/*", "--gpus-per-node", "0"]
    command += ["--sbatch", "cpus-per-task=1"]

    def submit(*arguments: str) -> str:
        assert main([*command, *arguments]) == 0
        return capsys.readouterr().out

    assert "2 cells with 0 GPUs each" in submit("--sbatch", "begin=now+10")
    assert "nothing to submit: 0 with results, 2 queued or running" in submit()
    deadline = time.monotonic() + 1200
    while slurm.run("squeue", "-h"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    logs = "".join(log.read_text() for log in (tmp_path / "out/slurm").glob("*.log"))
    assert logs.count("goes back into the queue") == 1 and logs.count("wrote ") == 2, logs
    cells = [name for name in NAMES if "attention" in name]
    assert all((tmp_path / "out/results" / name / "cell.json").is_file() for name in cells), logs
    assert "2 of 6 cells have results" in (tmp_path / "out/report/ladder.md").read_text(), logs
    assert "nothing to submit: 2 with results" in submit()
