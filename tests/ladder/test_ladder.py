"""Run a whole ladder on the CPU: six cells of 1M parameters, from a corpus to the report.

It is stopped within a cell and continued, a cell is trained a second time, and the figures of the report are computed
again from what is kept of the cells. This takes 25 s of CPU time.
"""

import csv
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from ladder_process import Ladders, ladders
from tiny_ladder import HELDOUT, NAMES, STEPS, write_ladder

from lrnn.ladder.progress import last_step
from lrnn.ladder.results import read_result
from lrnn.records import read_metrics
from lrnn.run_lock import RunLock


@pytest.fixture(scope="module")
def lrnn(tmp_path_factory) -> Ladders:
    with ladders(tmp_path_factory.mktemp("ladder")) as found:
        yield found


def wait_for_step(run: Path, step: int) -> None:
    while last_step(run) < step:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def out(lrnn) -> Path:
    """The folder of a ladder that was stopped in its first cells, and then continued to its end."""
    file, out = write_ladder(lrnn.folder), lrnn.folder / "out"
    command = lrnn.start("ladder", file)
    wait_for_step(out / "runs" / NAMES[0], 1)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 75, command.output
    assert "SIGTERM: 2 running cells write their checkpoints and stop" in command.output
    assert "started" in command.output and not (out / "results").exists()
    again = lrnn.run("ladder", file)
    assert again.output.count("finished") == 6 and "6 of 6 cells" in again.output
    return out


def test_every_cell_is_trained_once(out):
    """The first cell resumed at the step at which it was stopped, and none started before its turn."""
    starts = {}
    for name in NAMES:
        records = read_metrics(out / "runs" / name)
        steps = [record["step"] for record in records if "loss" in record and "event" not in record]
        assert steps == list(range(1, STEPS + 1)), name
        starts[name] = [record["step"] for record in records if record.get("event") == "start"]
    assert starts[NAMES[0]][0] == 0 and 1 <= starts[NAMES[0]][1] < STEPS
    assert all(found == [0] for found in [starts[name] for name in NAMES[2:]])


def test_results(out):
    """They say what was trained, and values by document lead to the figures."""
    for name in NAMES:
        result = read_result(out / "results" / name)
        assert (result.name, result.steps, result.tokens) == (name, STEPS, STEPS * 256)
        assert 0.9e6 < result.non_embedding_parameters < 1.1e6
        assert result.parameters - result.non_embedding_parameters == 2 * 400 * 128
        assert result.settings["run.optim.lr"] == 3e-3 and list(result.corpora) == ["code"]
        assert result.training["loss"] == [r["loss"] for r in read_metrics(out / "runs" / name) if "loss" in r][-1]
        (figure,) = [f for f in result.figures if (f.measure, f.of) == ("heldout_bits_per_byte", "code")]
        nats, n_bytes = result.documents[figure.documents].sum(0)
        assert n_bytes == sum(len(text) for text in heldout(out))
        assert len(result.documents[figure.documents]) == len(HELDOUT)
        assert figure.value == pytest.approx(-nats / n_bytes / math.log(2), rel=1e-12)
    assert (out / "runs" / NAMES[0] / "hf/config.json").is_file()


def heldout(out: Path) -> list[bytes]:
    lines = (out.parent / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line)["text"].encode() for line in lines]


def test_the_report(out):
    """Its means and paired differences are those of the kept figures."""
    bits = {}
    for name in NAMES:
        result = read_result(out / "results" / name)
        (figure,) = [f for f in result.figures if (f.measure, f.of) == ("heldout_bits_per_byte", "code")]
        bits[name] = figure.value
    with (out / "report/results.csv").open() as file:
        rows = {
            row["cell"]: float(row["value"])
            for row in csv.DictReader(file)
            if (row["measure"], row["of"]) == ("heldout_bits_per_byte", "code")
        }
    assert rows == pytest.approx(bits, rel=1e-6)
    pairs = [bits[f"1m/delta/negative/1536/seed-{s}"] - bits[f"1m/delta/positive/1536/seed-{s}"] for s in (0, 1)]
    with (out / "report/differences.csv").open() as file:
        (row,) = [
            row
            for row in csv.DictReader(file)
            if (row["measure"], row["of"], row["size"]) == ("heldout_bits_per_byte", "code", "1m")
        ]
    assert float(row["difference"]) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert float(row["stderr_own"]) == pytest.approx(np.std(pairs, ddof=1) / math.sqrt(2), rel=1e-5)
    text = (out / "report/ladder.md").read_text()
    assert "Does the command work?" in text
    for title, place in (("gated DeltaNet [0, 1]", "delta/positive"), ("attention", "attention/none")):
        values = [bits[f"1m/{place}/1536/seed-{seed}"] for seed in (0, 1)]
        error = np.std(values, ddof=1) / math.sqrt(2)
        assert re.search(rf"{re.escape(title)} \| 2 \| {np.mean(values):.4f} ± {error:.4f} \|", text), title


def test_a_cell_repeated_is_bitwise_the_same(lrnn, out, monkeypatch):
    """Whether it was stopped, or the command killed, and whether others ran beside it.

    Results are enough for the other cells: the folder of runs need not be there. The processes of a killed command end,
    and what they had done is not lost.
    """
    again = lrnn.folder / "again"
    shutil.copytree(out / "results", again / "results")
    shutil.rmtree(again / "results" / NAMES[1])
    command = lrnn.start("ladder", lrnn.folder / "ladder.yaml", f"out={again}")
    wait_for_step(again / "runs" / NAMES[1], 2)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    monkeypatch.setattr("lrnn.run_lock.WAIT_S", 120.0)
    with RunLock(again / "runs" / NAMES[1]), RunLock(again / "runs" / NAMES[1] / "cell"):
        pass  # nothing holds them any more
    assert list((again / "runs" / NAMES[1] / "checkpoints").glob("step-*"))
    command = lrnn.run("ladder", lrnn.folder / "ladder.yaml", f"out={again}")
    assert command.output.count("started") == 1
    first, second = (read_result(folder / "results" / NAMES[1]) for folder in (out, again))
    assert first.figures == second.figures and first.settings == second.settings
    assert all(first.documents[key].tobytes() == second.documents[key].tobytes() for key in first.documents)


def test_changed_settings(lrnn, out):
    """They are refused, and with --redo only what has changed is done again."""
    changed = [lrnn.folder / "ladder.yaml", f"out={out}", "measure.tokens=1500"]
    command = lrnn.start("ladder", *changed)
    assert command.wait() == 2
    assert f"{NAMES[0]} has measure.tokens = 1000 (now 1500)" in command.output and "--redo" in command.output
    before = read_metrics(out / "runs" / NAMES[0])
    assert "1 cells to run" in lrnn.run("ladder", *changed, "--redo", "--cells", NAMES[0]).output
    assert read_result(out / "results" / NAMES[0]).settings["measure.tokens"] == 1500
    assert read_metrics(out / "runs" / NAMES[0]) == before  # it was not trained again
