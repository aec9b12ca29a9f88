"""Test what one cell does around its training, with stand-ins for training, export and measures."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from ladder_results import result_of

from lrnn.errors import UserError
from lrnn.ladder import cell as one_cell
from lrnn.ladder.cell import run_cell
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.results import has_result, read_result, write_result
from lrnn.run_lock import RunLock

LEFT = {"log.txt", "cell", "hf", "measures", "checkpoints", "metrics.jsonl"}


@pytest.fixture
def run(write, monkeypatch):
    """`run(*overrides, redo, training)` runs the first cell, and returns the status, the cell and what was done.

    `training` is the program that stands for the training.
    """
    monkeypatch.setattr("lrnn.ladder.cells.Cell.corpora", lambda cell, if_here=False: {"code": "a", "prose": "b"})
    monkeypatch.setattr(one_cell, "choose_threads", lambda: None)
    done: list[str] = []
    program: list[str] = []

    def start(arguments: list[str]) -> subprocess.Popen:
        assert arguments[0] == "pretrain" and Path(arguments[1]).is_file()
        run_dir = Path(arguments[1]).parents[1]
        done.append("trained beside " + " ".join(sorted(path.name for path in run_dir.iterdir() if path.name in LEFT)))
        (run_dir / "checkpoints/step-00000040").mkdir(parents=True, exist_ok=True)
        (run_dir / "metrics.jsonl").write_text('{"step": 40}\n')
        (run_dir / "log.txt").write_text("a line")
        return subprocess.Popen(program)

    def export(trained, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        done.append("exported")

    def measure(run_dir, folder, settings, device, say):
        (run_dir / "measures").mkdir(exist_ok=True)
        done.append("measured")
        return [], {}

    monkeypatch.setattr(one_cell.processes, "start", start)
    monkeypatch.setattr(one_cell, "read_checkpoint", lambda folder: folder)
    monkeypatch.setattr(one_cell, "export", export)
    monkeypatch.setattr(one_cell, "measure", measure)
    monkeypatch.setattr(one_cell, "training_facts", lambda records, at_once: {"loss": 1.0})

    def run(*overrides: str, redo: bool = False, training: Sequence[str] = ("true",)):
        program[:] = training
        ladder, cells = load_ladder(write(), overrides)
        done.clear()
        return run_cell(ladder, cells[0], redo), cells[0], list(done)

    return run


def test_a_cell_is_done_once(run):
    status, cell, done = run()
    assert status == 0 and done == ["trained beside cell", "exported", "measured"] and has_result(cell.result_folder)
    assert run()[::2] == (0, [])
    result = read_result(cell.result_folder)
    assert (result.settings, result.training["loss"]) == (cell.settings, 1.0)


def test_a_training_that_fails_or_stops_gives_no_result(run):
    status, cell, done = run(training=["sh", "-c", "exit 75"])
    assert status == 75 and len(done) == 1 and not has_result(cell.result_folder)
    assert run(training=["sh", "-c", "exit 2"])[0] == 2
    assert run(training=["sh", "-c", "kill -9 $$"])[0] == 128 + signal.SIGKILL
    assert run()[2] == [
        "trained beside cell checkpoints log.txt metrics.jsonl",
        "exported",
        "measured",
    ]


def test_other_settings(run):
    """They are refused. With --redo, only measuring is repeated if the training is the same, otherwise all of it."""
    run()
    for override in ("measure.tokens=5000", "sizes.small.lr=0.5"):
        with pytest.raises(UserError, match="results of other settings"):
            run(override)
    assert run("measure.tokens=5000", redo=True)[::2] == (0, ["measured"])
    status, cell, done = run("sizes.small.lr=0.5", redo=True)
    assert status == 0 and done == ["trained beside cell log.txt", "exported", "measured"]
    assert read_result(cell.result_folder).settings["run.optim.lr"] == 0.5


def test_a_training_of_other_settings_without_a_result(run):
    run(training=["sh", "-c", "exit 75"])
    with pytest.raises(UserError, match=r"holds a training of .* with other settings; remove it, or add --redo"):
        run("sizes.small.lr=0.5")
    assert run("sizes.small.lr=0.5", redo=True)[2][0] == "trained beside cell log.txt"


@pytest.mark.parametrize(
    ("keep", "left"),
    [("checkpoints", LEFT), ("export", LEFT - {"checkpoints"}), ("nothing", {"cell", "log.txt"})],
)
def test_what_is_kept(run, keep, left):
    _, cell, _ = run(f"keep={keep}")
    assert {path.name for path in cell.run_dir.iterdir()} & LEFT == left and has_result(cell.result_folder)
    if keep != "nothing":
        assert run("measure.tokens=5000", f"keep={keep}", redo=True)[2] == ["measured"]


def test_a_signal_is_passed_on_to_the_training(run):
    """And after a training that was done nevertheless, the cell stops before it exports."""
    own = os.getpid()
    program = f"trap 'exit 75' USR1; kill -USR1 {own}; for i in $(seq 200); do sleep 0.05; done"
    with pytest.raises(SystemExit) as stopped:
        run(training=["sh", "-c", program])
    assert stopped.value.code == 75
    with pytest.raises(SystemExit) as stopped:
        run(training=["sh", "-c", f"trap '' TERM; kill -TERM {own}; sleep 0.2"])
    assert stopped.value.code == 75
    assert run()[0] == 0


def test_the_cell_of_another_process_is_left_alone(run, monkeypatch):
    monkeypatch.setattr("lrnn.run_lock.WAIT_S", 0.0)
    _, cell, _ = run(training=["sh", "-c", "exit 75"])
    with RunLock(cell.run_dir / "cell"), pytest.raises(UserError, match="is in use by process"):
        run()
    write_result(cell.result_folder, result_of(cell))
    assert run()[0] == 0
