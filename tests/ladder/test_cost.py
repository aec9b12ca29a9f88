"""Test what `lrnn ladder --dry-run` says of the cells that are left."""

import json
import re

import pytest
from ladder_results import result_of

from lrnn.cli import main
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.cost import costs
from lrnn.ladder.processes import write_settings
from lrnn.ladder.results import write_result


def test_hours_are_those_of_lrnn_plan(capsys, tmp_path):
    """The hours of a cell are those that `lrnn plan` says of its run."""
    _, cells = load_ladder("ranges")
    for cell in (cells[0], cells[-1]):
        write_settings(cell.config, tmp_path / "run.yaml")
        assert main(["plan", str(tmp_path / "run.yaml"), "--gpu", "H200", "--gpus", str(cell.gpus), "--json"]) == 0
        days = json.loads(capsys.readouterr().out)["configured"]["days"]
        (cost,) = costs([cell], "H200")
        assert cost.hours == pytest.approx(24 * days, rel=1e-9)
        assert cost.gpu_hours == cell.gpus * cost.hours


def test_a_dry_run(write, capsys, tmp_path):
    path = write()
    _, cells = load_ladder(path)
    write_result(cells[0].result_folder, result_of(cells[0]))
    assert main(["ladder", str(path), "--dry-run", "--cells", "*seed-0"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "seed-" in line] == [cells[1].name, cells[2].name]
    (row,) = re.findall(rf"{cells[1]} +([\d.]+)M +([\d.]+)M +\d+M +(\d+) +1 +[\d.]+\n", out)
    assert row[2] == "40" and float(row[0]) == pytest.approx(float(row[1]) + 2 * 512 * 64 / 1e6, abs=0.02)
    assert "GPU-hours of H200 for 2 trainings" in out and "1 cells have results" in out
    assert "Speed was not measured below 339M parameters" in out
    assert not (tmp_path / "out/runs").exists()
