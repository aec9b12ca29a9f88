"""Test what the tables and plots of `lrnn track` show for made-up results."""

import json

import numpy as np
import pytest

from lrnn.track.grid import load_grid
from lrnn.track.pictures import draw_eigenvalues, draw_lengths
from lrnn.track.report import write_report

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "intermediate_size": 64}
S3 = {"task": "group_word", "group": "S3"}


@pytest.fixture
def grid(tmp_path):
    """Return `grid(mixers, **changes)`: a grid of models named after their mixers with two seeds, and its cells."""

    def make(*mixers, **changes):
        settings = {
            "out": str(tmp_path), "tasks": {"parity": {"task": "parity"}}, "seeds": [3, 4],
            "models": {mixer: SIZES | {"mixer": mixer} for mixer in mixers},
            "train": {"min_length": 3, "max_length": 10, "steps": 2, "batch_size": 8, "lr": 1e-2},
            "test": {"min_length": 10, "max_length": 13}, **changes,
        }  # fmt: skip
        path = tmp_path / "grid.yaml"
        path.write_text(json.dumps(settings))
        return load_grid(path)

    return make


def result(cell, by_length=None, scaled_accuracy=0.5):
    """Return a cell's result as in `result.json`."""
    return {
        "task": cell.task_name, "model": cell.model_name, "range": cell.range, "seed": cell.seed, "floor": 0.25,
        "scaled_floor": 0.0, "scaled_accuracy": scaled_accuracy, "by_length": by_length or {"10": 1.0, "12": 0.5},
    }  # fmt: skip


def curves(axis):
    """Return (x, y) of the lines by label."""
    return {line.get_label(): tuple(np.asarray(a).tolist() for a in line.get_data()) for line in axis.lines}


def test_accuracy_by_length(grid):
    """The plot shows the median and the band of the seeds, the training length and the floor."""
    _, cells = grid("deltanet")
    seeds = [{"10": 1.0, "11": 0.8, "13": 0.5}, {"10": 0.6, "13": 0.1}]  # no sample of 11
    results = [(cell, result(cell, seeds[cell.seed - 3])) for cell in cells]
    (axis,) = draw_lengths("a title", results, training_length=10).axes
    lines = curves(axis)
    assert lines.pop("longest in training") == ([10, 10], [0, 1])
    assert lines.pop("majority floor 0.25") == ([0, 1], [0.25, 0.25])
    assert set(lines) == {"deltanet [-1, 1]", "deltanet [0, 1]"}
    for x, y in lines.values():
        assert x == [10, 11, 13] and y == pytest.approx([0.8, 0.8, 0.3])
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.1) and heights.max() == pytest.approx(1.0)
    assert {text.get_text() for text in axis.get_legend().get_texts()} >= {"longest in training", "deltanet [0, 1]"}
    assert axis.get_title() == "a title"


def test_long_curves_are_drawn_in_bins(grid):
    _, cells = grid("deltanet", seeds=[3], ranges=["negative"])
    by_length = {str(n): float(n % 2) for n in range(48)}
    (axis,) = draw_lengths("", [(cells[0], result(cells[0], by_length))], 10).axes
    x, y = curves(axis)["deltanet [-1, 1]"]
    assert x == [2 * i + 0.5 for i in range(24)] and y == [0.5] * 24


def test_a_share_of_right_prefixes_has_no_floor(grid):
    """The floor is that of one position: no constant answer is right at all positions in a row."""
    _, cells = grid("deltanet", tasks={"s3": S3})
    (axis,) = draw_lengths("", [(cell, result(cell)) for cell in cells], 10).axes
    assert set(curves(axis)) == {"deltanet [-1, 1]", "deltanet [0, 1]", "longest in training"}


def test_the_plot_of_eigenvalues(grid):
    """They are those of the first seed, which the title names, and are called 1 - beta if they are that."""
    _, cells = grid("deltanet", "mamba", "transformer", ranges=["negative"])
    shares = {3: [0.25, 0.75] + [0.0] * 18, 4: [0.0] * 19 + [1.0]}
    for cell in cells:
        cell.folder.mkdir(parents=True)
        eigenvalues = {} if cell.model_name == "transformer" else {"histogram": [shares[cell.seed]]}
        records = [{"step": step, "eigenvalues": eigenvalues} for step in (1, 2)]
        (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    results = [(cell, result(cell)) for cell in cells]
    axes = [axis for axis in draw_eigenvalues(results).axes if axis.get_xlabel() == "step"]
    assert [axis.get_title() for axis in axes] == ["deltanet [-1, 1], seed 3", "mamba [-1, 1], seed 3"]
    assert [axis.get_ylabel() for axis in axes] == ["eigenvalue 1 - beta", "eigenvalue of the state transition"]
    drawn = axes[0].collections[0].get_array()
    assert drawn.shape == (20, 2) and drawn[:, 1].tolist() == shares[3]
    assert draw_eigenvalues([r for r in results if r[0].model_name == "transformer"]) is None


def test_a_table_of_all_tasks(grid, tmp_path):
    """It has a row per model and range and a column per task, with the best [median] of the seeds."""
    settings, cells = grid("rwkv7", "transformer", tasks={"parity": {"task": "parity"}, "s3": S3}, seeds=[3, 4, 5])
    scores = {3: 0.125, 4: 0.25, 5: 0.75}
    for cell in cells:
        cell.folder.mkdir(parents=True)
        (cell.folder / "metrics.jsonl").write_text("")
    results = [result(c, scaled_accuracy=scores[c.seed] + 0.125 * (c.task_name == "s3")) for c in cells]
    summary, first, second = write_report(settings, cells, results).split("## ")[1:]
    row = "0.750 [0.250] | 0.875 [0.375] |"
    assert [line for line in summary.splitlines() if line.startswith("|")] == [
        "| model | eigenvalues | parity | s3 |",
        "|---|---|---|---|",
        f"| rwkv7 | [-1, 1] | {row}",
        f"| rwkv7 | [0, 1] (1) | {row}",
        f"| transformer | - | {row}",
    ]
    assert first.startswith("parity\n") and second.startswith("s3\n")
    assert all(section.count("\n(1) Where RWKV-7 forgets") == 1 for section in (summary, first, second))
    assert (tmp_path / "accuracy-s3.png").is_file() and not list(tmp_path.glob("eigenvalues*"))
