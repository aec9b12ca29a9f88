"""Test curves of `lrnn plot`: moving averages, bands over seeds, scores of evaluations."""

import json
import statistics

import numpy as np
import pandas as pd
import pytest
import yaml

from lrnn.cli import main
from lrnn.pretrain.metrics.curves import common_name, limits, smooth
from lrnn.records import events_by_step

SCORES = {"lrnn_arc_easy": {"acc": 0.25, "acc_norm": 0.3}}
LOSSES = {0: [4.0, 3.0, 2.5], 1: [4.2, 3.3, 2.4], 2: [4.1, 2.9, 2.9]}


@pytest.fixture
def figures(monkeypatch):
    """Return a list that gets every figure that is written."""
    import matplotlib.figure

    found, original = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (found.append(self), original(self, *a, **k))
    )
    return found


def write_run(run_dir, seed=0, losses=(4.0, 3.0, 2.5), **config):
    """Write the folder of a run with a record every 10 steps, and an evaluation at steps 20 and 30."""
    run_dir.mkdir()
    rows = [{"event": "start", "step": 0, "resumed": False}]
    for i, loss in enumerate(losses, 1):
        rows.append({"step": 10 * i, "loss": loss, "lr": 0.1, "tokens_per_second_per_gpu": 100.0 + seed})
        if i > 1:
            scores = {task: {name: x + i / 100 + seed for name, x in s.items()} for task, s in SCORES.items()}
            event = {"event": "eval", "step": 10 * i, "scores": scores, "stderr": {"lrnn_arc_easy": {"acc": 0.01}}}
            rows.append(event)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "run.yaml").write_text(yaml.safe_dump({"run_dir": str(run_dir), "seed": seed, "steps": 30, **config}))
    return str(run_dir)


@pytest.fixture
def seeds(tmp_path):
    return [write_run(tmp_path / f"a-seed{seed}", seed, losses) for seed, losses in LOSSES.items()]


@pytest.mark.parametrize("weight", [0.0, 0.6, 0.99])
def test_smoothing_is_that_of_pandas(weight):
    values = np.random.default_rng(0).normal(size=50)
    expected = pd.Series(values).ewm(alpha=1 - weight, adjust=True).mean()  # as TensorBoard's, it begins at the first
    np.testing.assert_allclose(smooth(values, weight), expected)


def test_a_gap_does_not_end_the_smoothed_line():
    smoothed = smooth(np.array([1.0, np.nan, 3.0]), 0.5)
    assert smoothed[0] == 1 and np.isnan(smoothed[1]) and smoothed[2] == pytest.approx((0.25 + 1.5) / 0.75)


def test_bands():
    values = np.array(list(LOSSES.values()))
    low, high = limits(values, "minmax")
    assert low.tolist() == [4.0, 2.9, 2.4] and high.tolist() == [4.2, 3.3, 2.9]
    low, high = limits(values, "stderr")
    for column, (below, above) in enumerate(zip(low, high, strict=True)):
        of_column = [losses[column] for losses in LOSSES.values()]
        error = statistics.stdev(of_column) / 3**0.5
        assert [below, above] == pytest.approx([statistics.mean(of_column) - error, statistics.mean(of_column) + error])


def test_names_of_groups():
    assert common_name(["runs/a-seed0", "runs/a-seed1"]) == "runs/a (2 seeds)"
    assert common_name(["runs/1", "runs/2"]) == "runs (2 seeds)"
    assert common_name(["x", "y"]) == "x (2 seeds)" and common_name(["runs/a-seed0"]) == "runs/a-seed0"


def test_runs_that_differ_by_seed_are_one_line(tmp_path, seeds, figures):
    other = write_run(tmp_path / "b", steps=31)
    assert main(["plot", *seeds, other, "--band", "minmax", "--out", str(tmp_path / "x.png")]) == 0
    loss, *_ = figures[0].subfigs[0].axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in loss.get_lines()}
    means = [statistics.mean(column) for column in zip(*LOSSES.values(), strict=True)]
    assert lines == {f"{tmp_path}/a (3 seeds) training": pytest.approx(means), f"{other} training": [4.0, 3.0, 2.5]}
    (band,) = loss.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} >= {(10, 4.0), (10, 4.2), (30, 2.4)}
    assert "smallest to largest" in figures[0].get_suptitle()


def test_runs_are_lines_without_a_band(tmp_path, seeds, figures):
    assert main(["plot", *seeds, "--smooth", "0.5", "--out", str(tmp_path / "x.png")]) == 0
    loss = figures[0].subfigs[0].axes[0]
    raw = [line.get_ydata().tolist() for line in loss.get_lines() if line.get_alpha() == 0.25]
    smoothed = [line.get_ydata().tolist() for line in loss.get_lines() if line.get_alpha() is None]
    assert raw == list(LOSSES.values()) and len(smoothed) == 3
    assert smoothed[0] == pytest.approx(smooth(np.array(LOSSES[0]), 0.5).tolist())


def test_every_metric_has_a_panel(seeds, tmp_path, figures):
    assert main(["plot", seeds[0], seeds[1], "--out", str(tmp_path / "x.png")]) == 0
    panels = {axis.get_title(): axis for axis in figures[0].subfigs[1].axes}
    assert panels.keys() == {"lrnn_arc_easy\nacc", "lrnn_arc_easy\nacc_norm"}
    points = [c.lines[0].get_xydata().tolist() for c in panels["lrnn_arc_easy\nacc"].containers]
    assert points == [[[20, 0.27], [30, 0.28]], [[20, 1.27], [30, 1.28]]]


def test_bad_options(seeds, tmp_path, capsys):
    (tmp_path / "a-seed1" / "run.yaml").unlink()
    assert main(["plot", *seeds, "--band", "stderr"]) == 2
    assert "a-seed1 holds no run.yaml" in capsys.readouterr().err
    for weight in ("1", "-0.1", "x"):
        with pytest.raises(SystemExit):
            main(["plot", *seeds, "--smooth", weight])


def test_events_of_steps_that_the_run_went_back_behind_do_not_count():
    def of(step):
        return {"event": "eval", "step": step}

    start = {"event": "start", "step": 0}
    records = [start, of(10), of(20), of(30), {"event": "start", "step": 20}, {"step": 25, "loss": 1}]
    assert list(events_by_step(records, "eval")) == [10, 20]
    records += [of(30), {"event": "rollback", "step": 33, "to": "runs/a/checkpoints/step-00000010"}]
    assert list(events_by_step(records, "eval")) == [10]
    assert list(events_by_step([*records, of(20)], "eval")) == [10, 20] and events_by_step(records, "samples") == {}
