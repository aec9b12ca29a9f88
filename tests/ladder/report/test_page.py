"""Test the pictures and the HTML page: what they show of made-up results, gaps among them, and that they are whole."""

import base64
import functools
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_up_ladder import Truth, make_ladder, make_results

from lrnn.ladder.report import pictures, scaling
from lrnn.ladder.report.curves import draw_training
from lrnn.ladder.report.differences import ALL, Differences
from lrnn.ladder.report.fit import fit
from lrnn.ladder.report.gathered import Gathered
from lrnn.ladder.report.pictures import draw_differences, draw_results
from lrnn.ladder.report.write import write_report

HOSTILE = '</td><script>alert(1)</script> {{ 7 * 7 }} | "x'
GRIDS = [
    {"sizes": ["15m"], "arms": ["delta", "attention"], "seeds": [0, 1, 2]},
    {"sizes": ["30m"], "arms": ["delta"], "seeds": [0]},
    {"sizes": ["15m"], "arms": ["hybrid"], "ranges": ["negative"], "seeds": [0]},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A ladder with all measures, without the last cell's result: the larger size has one range alone."""
    ladder, cells = make_ladder(tmp_path_factory.mktemp("ladder"), GRIDS, question=HOSTILE)
    cells.sort(key=lambda cell: cell.name == "30m/delta/positive/605400K/seed-0")
    return ladder, cells, make_results(cells[:-1], Truth(), rich=True)


@pytest.fixture(scope="module")
def drawn(made):
    """The figures by file."""
    gathered = Gathered(made[0], made[2])
    found = [*draw_results(gathered), *draw_differences(gathered, Differences(gathered)), *draw_training(gathered)]
    return {file: figure for file, _, _, figure in found}


def bars(axis):
    """Return x, y and half lengths of bars by label."""
    found = {}
    for container in axis.containers:
        line, _, (segments,) = container
        ends = [segment[:, 1] if len(segment) else np.full(2, np.nan) for segment in segments.get_segments()]
        found[container.get_label()] = (*line.get_data(), np.diff(ends).flatten() / 2)
    return found


def test_files(drawn):
    assert set(drawn) == {
        "loss.png", "traces-15m.png", "traces-30m.png", "retrieval-15m.png", "retrieval-30m.png", "answers-15m.png",
        "answers-30m.png", "position.png",
        "differences.png", "training.png", "eigenvalues.png",
    }  # fmt: skip


def test_every_axis_has_names(drawn):
    for file, figure in drawn.items():
        axes = [axis for axis in figure.axes if axis.get_visible()]
        assert all(axis.get_xlabel() and axis.get_title() for axis in axes), file
        assert axes[0].get_ylabel() or axes[0].get_yticklabels()[0].get_text(), file


def test_loss(made, drawn):
    """Points are means over seeds, bars their standard errors, and differences are paired."""
    gathered = Gathered(made[0], made[2])
    losses = {
        (group.size, group.range): gathered.values(group, pictures.HEADLINE)
        for group in gathered.measured
        if group.arm == "delta"
    }
    by_size, by_compute, difference = map(bars, drawn["loss.png"].axes)
    x, y, half = by_size["gated DeltaNet [-1, 1]"]
    three = list(losses["15m", "negative"].values())
    assert x.tolist() == [15_420_000, 30_270_000]
    assert y == pytest.approx([np.mean(three), losses["30m", "negative"][0]])
    assert half[0] == pytest.approx(np.std(three, ddof=1) / 3**0.5) and np.isnan(half[1])
    assert by_compute["transformer"][0].tolist() == [6 * 15_420_000 * 4706 * 65_536]
    pairs = [losses["15m", "negative"][seed] - losses["15m", "positive"][seed] for seed in range(3)]
    _, y, half = difference["gated DeltaNet [-1, 1]"]
    # The larger size has no pair.
    assert y == pytest.approx([np.mean(pairs)]) and half == pytest.approx([np.std(pairs, ddof=1) / 3**0.5])
    assert set(difference) == {"gated DeltaNet [-1, 1]", "3:1 hybrid [-1, 1]", "transformer"}


def test_forest(made, drawn):
    """A row per arm and size, with the interval; the arrow shows where the wide range is better."""
    differences = Differences(Gathered(made[0], made[2]))
    (d,) = [d for d in differences.family() if d.quantity == pictures.HEADLINE]
    axes = drawn["differences.png"].axes
    assert d.place.size == ALL and [text.get_text() for text in axes[0].get_yticklabels()] == ["gated DeltaNet, 15m"]
    line, _, (segments,) = axes[0].containers[0]
    assert line.get_xdata() == pytest.approx([d.mean])
    assert segments.get_segments()[0][:, 0] == pytest.approx([d.interval.low, d.interval.high])
    assert [axis.get_xlabel().split("\n")[1] for axis in axes[:3]] == ["<- better", "<- better", "better ->"]


def test_accuracies_by_length(made, drawn):
    gathered = Gathered(made[0], made[2])
    axis = next(axis for axis in drawn["traces-15m.png"].axes if axis.get_title() == "swaps")
    x, y, _ = bars(axis)["gated DeltaNet [0, 1]"]
    results = [r for r in gathered.results if r.name.startswith("15m/delta/positive")]
    at_64 = [f.value for r in results for f in r.figures if (f.measure, f.of, f.at) == ("traces_accuracy", "swaps", 64)]
    assert x.tolist() == [4, 8, 16, 32, 64, 128, 256, 512] and y[4] == pytest.approx(np.mean(at_64))
    assert set(bars(axis)) == {"gated DeltaNet [-1, 1]", "gated DeltaNet [0, 1]", "transformer", "3:1 hybrid [-1, 1]"}


def test_training(made, drawn):
    """Curves end at the last tokens, and eigenvalues are drawn only of arms that have them."""
    line = drawn["training.png"].axes[0].lines[0]
    assert line.get_xdata()[-1] == pytest.approx(308.4, rel=1e-3) and 0.04 * 308 < line.get_xdata()[0] < 0.1 * 308
    titles = [axis.get_title() for axis in drawn["eigenvalues.png"].axes if axis.get_visible()]
    assert titles == [
        "15m, gated DeltaNet [-1, 1]", "15m, gated DeltaNet [0, 1]", "15m, 3:1 hybrid [-1, 1]",
        "30m, gated DeltaNet [-1, 1]",
    ]  # fmt: skip


class Elements(HTMLParser):
    """Collect the tags of a page, and check that every element is closed."""

    VOID = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.images, self.texts, self.open = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        known = dict(attributes)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known["href"]] if "href" in known else []
        self.images += [known["src"]] if "src" in known else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_and_order(made, tmp_path, monkeypatch):
    """The page is well-formed, holds its pictures, and takes texts as texts. Permuted results give the same bytes."""
    monkeypatch.setattr(scaling, "fit", functools.partial(fit, resamples=10))
    ladder, cells, results = made
    mixed = random.Random(0).sample(results, len(results))
    for name, given in (("a", results), ("b", mixed)):
        (tmp_path / name).mkdir()
        write_report(ladder, cells, given, tmp_path / name)
    folder = tmp_path / "a/report"
    files = sorted(path.name for path in folder.iterdir())
    assert {"ladder.md", "report.html", "results.csv", "differences.csv", "loss.png"} <= set(files)
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "b/report" / name).read_bytes(), name
    page = Elements((folder / "report.html").read_text())
    assert "script" not in page.tags and any(HOSTILE in text for text in page.texts)
    assert len(set(page.ids)) == len(page.ids) and {link.removeprefix("#") for link in page.links} == set(page.ids)
    written = [(folder / name).read_bytes() for name in files if name.endswith(".png")]
    shown = [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(shown) == sorted(written)
    # Markdown links to the same pictures, and its other texts are on the page too.
    markdown = (folder / "ladder.md").read_text()
    assert sorted(re.findall(r"!\[.*\]\((.*)\)", markdown)) == [name for name in files if name.endswith(".png")]
    long = ["Results by kind", "Differences by size and tokens", "All differences"]
    assert set(long) <= set(page.texts) and not any(f"## {title}" in markdown for title in long)
    # Markdown has the mean over formats of traces, the page each of them.
    kinds = {text for text in page.texts if text in ("swaps", "modular", "switch", "mean")}
    assert kinds == {"swaps", "modular", "switch", "mean"} and "| swaps |" not in markdown
    by_seed = [
        np.mean([f.value for f in r.figures if (f.measure, f.at) == ("traces_accuracy", 64)])
        for r in results
        if r.name.startswith("15m/delta/negative")
    ]
    assert f"{np.mean(by_seed):.3f} ± {np.std(by_seed, ddof=1) / 3**0.5:.3f}" in markdown
