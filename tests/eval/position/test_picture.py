"""Test that the labels of the picture of `lrnn position` have room, whatever the range of the perplexities."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from lrnn.eval.position import report
from lrnn.eval.position.bins import log_edges


def results(low: float, high: float, length: int, models: int) -> dict:
    """Return what `report.plot` reads, of models whose perplexity falls from `high` to `low`."""
    edges = log_edges(length, anchor=256, per_octave=4)
    documents, bins = 20, len(edges) - 1
    counts = np.repeat(np.diff(edges)[None], documents, 0)
    nll = np.log(np.linspace(high, low, bins)) + np.random.default_rng(0).normal(0, 1e-3, (models, documents, bins))
    means, differences = report.curves([f"runs/{i}/hf" for i in range(models)], nll * counts, counts, resamples=20)
    return {
        "data": {"taken": documents},
        "models": [{"training_length": 256} for _ in range(models)],
        "curves": [report.rows(curve, edges, counts, ppl=True) for curve in means],
        "differences": [report.rows(curve, edges, counts, ppl=False) for curve in differences],
    }


@pytest.mark.parametrize(
    ("low", "high", "length", "models"),
    [(60, 600, 4096, 2), (3.8, 4.6, 32768, 1), (9, 11, 512, 1), (3, 1e7, 262144, 1), (1.1, 1e200, 4096, 1)],
)
def test_labels_do_not_overlap(low, high, length, models, tmp_path, monkeypatch):
    seen = []
    original = Figure.savefig

    def savefig(figure, *arguments, **options):
        original(figure, *arguments, **options)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                ticks = [tick for minor in (False, True) for tick in axis.get_ticklabels(minor=minor)]
                seen.append([tick.get_window_extent() for tick in ticks if tick.get_visible() and tick.get_text()])

    monkeypatch.setattr(Figure, "savefig", savefig)
    report.plot(tmp_path / "position.png", results(low, high, length, models))
    assert len(seen) == 2 * models  # a second model adds a second picture below
    for boxes in seen[1::2]:
        assert len(boxes) >= 3
    assert not [(a, b) for boxes in seen for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
