"""Test the report of made-up results with a known truth: tables, pairs, verdicts, and what it says of gaps."""

import csv
import dataclasses
import functools
import io
import re

import numpy as np
import pytest
from made_up_ladder import DOMAINS, Truth, make_ladder, make_results

from lrnn.eval.statistics import bits_per_byte
from lrnn.ladder.measures import BYTES, MEASURES, NATS
from lrnn.ladder.report import scaling, write
from lrnn.ladder.report.differences import ALL, BETWEEN_RANGES, Differences, paired_stderr
from lrnn.ladder.report.document import Bullets, Heading, Section, Table, to_markdown
from lrnn.ladder.report.fit import fit
from lrnn.ladder.report.gathered import MEAN, Gathered, Quantity
from lrnn.ladder.report.wording import count, decimal, verdict
from lrnn.ladder.report.write import write_report

LOSS = Quantity("heldout_nats_per_token", MEAN, None)
GRIDS = [
    {"sizes": ["15m"], "arms": ["delta", "hybrid", "attention"], "seeds": [0, 1, 2]},
    {"sizes": ["30m"], "arms": ["delta", "hybrid"], "seeds": [0, 1, 2]},
    {"sizes": ["60m"], "arms": ["delta"], "seeds": [0]},
]
TRUTH = Truth(
    offsets={("delta", "negative"): -0.02, ("hybrid", "negative"): -0.05, ("hybrid", "positive"): -0.05}, noise=0.001
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The fit's bootstrap and the pictures are tested by themselves."""
    monkeypatch.setattr(scaling, "fit", functools.partial(fit, resamples=10))
    monkeypatch.setattr(write, "_pictures", lambda *_: [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A ladder, its cells, and results of all of them."""
    ladder, cells = make_ladder(tmp_path_factory.mktemp("ladder"), GRIDS)
    return ladder, cells, make_results(cells, TRUTH)


def differences(ladder, results):
    return Differences(Gathered(ladder, results))


def at(found, quantity=LOSS, contrast=BETWEEN_RANGES, **place):
    """Return the only difference at a place."""
    (one,) = [
        d
        for d in found.all
        if d.quantity == quantity
        and d.place.contrast == contrast
        and all(getattr(d.place, name) == value for name, value in place.items())
    ]
    return one


def report(ladder, cells, results, folder):
    """Return the Markdown, and the rows of the two tables."""
    write_report(ladder, cells, results, folder)
    files = [(folder / "report" / name).read_text() for name in ("ladder.md", "results.csv", "differences.csv")]
    return files[0], *(list(csv.DictReader(io.StringIO(text))) for text in files[1:])


def tables(markdown):
    """Return the tables of a Markdown text as lists of cells, and check that all rows of one are equally long."""
    found, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            rows.append([cell.strip().replace(r"\|", "|") for cell in cells])
        elif rows:
            assert {len(row) for row in rows} == {len(rows[0])}, rows
            assert all(set(cell) <= set("-:") for cell in rows[1])
            found.append([rows[0], *rows[2:]])
            rows = []
    return found


def test_a_difference_by_hand(made):
    """Mean, own error, pooled error and Student's interval of one place are those of a calculation by hand."""
    ladder, _, results = made
    by_name = {result.name: result for result in results}

    def loss(name):
        of = {(f.measure, f.of): f.value for f in by_name[name].figures}
        return sum(weight * of["heldout_nats_per_token", domain] for domain, (weight, _, _) in DOMAINS.items())

    def pairs(size, arm, budget, seeds):
        return [
            loss(f"{size}/{arm}/negative/{budget}/seed-{s}") - loss(f"{size}/{arm}/positive/{budget}/seed-{s}")
            for s in seeds
        ]

    own = pairs("15m", "delta", "308400K", (0, 1, 2))
    places = [own, pairs("15m", "hybrid", "308400K", (0, 1, 2)), pairs("30m", "delta", "605400K", (0, 1, 2))]
    places += [pairs("30m", "hybrid", "605400K", (0, 1, 2)), pairs("60m", "delta", "1231600K", (0,))]
    d = at(differences(ladder, results), size="15m", arm="delta")
    assert d.mean == pytest.approx(np.mean(own)) and d.seeds == 3
    assert d.stderr_own == pytest.approx(np.std(own, ddof=1) / 3**0.5)
    assert d.own_interval.high - d.mean == pytest.approx(4.3027 * d.stderr_own, rel=1e-4)
    assert d.pooled.df == 8
    assert d.pooled.deviation == pytest.approx((sum(np.var(p) * len(p) for p in places) / 8) ** 0.5)
    # A single pair has no scatter of its own, and the pooled one.
    one = at(differences(ladder, results), size="60m", arm="delta")
    assert one.own is None and one.stderr_pooled == pytest.approx(d.pooled.deviation)
    # Over sizes, every pair counts the same.
    both = at(differences(ladder, results), size=ALL, arm="delta")
    assert both.seeds == 7 and both.mean == pytest.approx(np.mean(places[0] + places[2] + places[4]))
    assert both.place.tokens is None


def test_the_truth_is_found(made):
    """Where ranges differ, the verdict says so, and where they do not, it says within what they are equal."""
    ladder, _, results = made
    found = differences(ladder, results)
    delta, hybrid = (at(found, size=ALL, arm=arm) for arm in ("delta", "hybrid"))
    assert delta.interval.low <= -0.02 <= delta.interval.high and hybrid.interval.low <= 0 <= hybrid.interval.high
    assert verdict(delta, ladder.effect, "[-1, 1]") == "[-1, 1] better"
    within = verdict(hybrid, ladder.effect, "[-1, 1]")
    assert within.startswith("equal within 0.00") and within.endswith("less than 0.005")
    assert float(within.split()[2].rstrip(",")) >= hybrid.interval.bound
    arm = at(found, contrast="hybrid - delta", range="positive", size=ALL)
    assert arm.interval.low <= -0.05 <= arm.interval.high
    # The transformer has no range, and is compared with both; these comparisons share its runs.
    for against, truth in (("negative", 0.02), ("positive", 0.0)):
        arm = at(found, contrast="attention - delta", range="none", against=against, size=ALL)
        assert arm.seeds == 3 and arm.pooled.df == 2
        assert arm.interval.low <= truth <= arm.interval.high


def test_pairs_are_surer_than_groups(made):
    """The data's noise, which a pair shares, is not in the error of the difference."""
    ladder, cells, _ = made
    results = make_results(cells, dataclasses.replace(TRUTH, data_noise=0.02))
    d = at(differences(ladder, results), size="15m", arm="delta")
    gathered = Gathered(ladder, results)
    groups = [group for group in gathered.measured if (group.size, group.arm) == ("15m", "delta")]
    sides = [list(gathered.values(group, LOSS).values()) for group in groups]
    unpaired = sum(np.var(side, ddof=1) / 3 for side in sides) ** 0.5
    assert d.stderr_own < unpaired / 5


def test_error_over_documents():
    """It is that of a bootstrap which draws the same documents for both sides and all seeds."""
    rng = np.random.default_rng(0)
    n = 300
    shared = rng.normal(3, 1, n)
    n_bytes = rng.integers(50, 500, n).astype(float)
    rates = shared + rng.normal(0, 0.05, (2, 3, n))
    pairs = np.stack([-rates * n_bytes, np.broadcast_to(n_bytes, rates.shape)], -1)
    draws = rng.integers(n, size=(1000, n))
    drawn = [(bits_per_byte(pairs[0][:, i]) - bits_per_byte(pairs[1][:, i])).mean() for i in draws]
    assert paired_stderr("bits_per_byte", pairs) == pytest.approx(np.std(drawn), rel=0.08)
    means = [(rates[0] - rates[1])[:, i].mean() for i in draws]
    assert paired_stderr("mean", rates) == pytest.approx(np.std(means), rel=0.08)
    assert paired_stderr("mean", rates) < 0.1 * rates[0].mean(0).std() / n**0.5


def test_all_measures_are_means_or_ratios():
    """No other aggregate of documents has a closed form here."""
    assert {measure.aggregate for measure in MEASURES.values()} <= {"mean", BYTES, NATS}


def test_single_seeds_decide_nothing(made, tmp_path):
    """Documents do not tell how another seed would fare: there is their error, but no interval, verdict or p value."""
    ladder, cells, _ = made
    results = make_results([cell for cell in cells if cell.seed == 0 and cell.size == "15m"], TRUTH)
    d = at(differences(ladder, results), size="15m", arm="delta")
    assert d.own is d.own_interval is d.pooled is d.interval is None and d.stderr_documents > 0
    assert verdict(d, 0.005, "[-1, 1]") == "not decided: single seeds"
    markdown, _, pairs = report(ladder, cells, results, tmp_path)
    assert f"({decimal(d.mean, 4, True)} ± {d.stderr_documents:.4f} over documents, 1 pair)" in markdown
    assert not any(row["p"] or row["p_holm"] or row["low"] for row in pairs)
    ends = ("[-1, 1] is", "the arm is")
    verdicts = {row[-1] for table in tables(markdown) if table[0][-1] in ends for row in table[1:]}
    assert verdicts == {"not decided: single seeds"}


def test_without_documents(made):
    """The interval is that of the seeds, and the verdict says so."""
    ladder, cells, _ = made
    found = differences(ladder, make_results(cells, dataclasses.replace(TRUTH, with_documents=False)))
    d = at(found, size=ALL, arm="hybrid")
    assert d.stderr_documents is None and d.interval.high - d.mean == pytest.approx(2.306 * d.stderr_pooled, rel=1e-4)
    assert "over seeds alone" in verdict(d, 0.005, "[-1, 1]")


def test_tables_and_csv(made, tmp_path):
    """The tables parse; mean and error of a cell are those of the figures, which are all in results.csv."""
    ladder, cells, results = made
    markdown, rows, pairs = report(ladder, cells, results, tmp_path)
    assert len(rows) == sum(len(r.figures) + len(r.training) for r in results)
    columns = ["size", "tokens", "arm", "seeds", "code", "mathematics", "mix"]
    (bits,) = [table for table in tables(markdown) if table[0] == columns]
    (row,) = [row for row in bits if row[:3] == ["15m", "308.4M", "gated DeltaNet [-1, 1]"]]
    code = [row for row in rows if (row["measure"], row["of"]) == ("heldout_bits_per_byte", "code")]
    values = [float(row["value"]) for row in code if row["cell"].startswith("15m/delta/negative")]
    assert row[3] == "3" and row[4] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / 3**0.5:.4f}"
    (row,) = [row for row in bits if row[:3] == ["60m", "1.232B", "gated DeltaNet [-1, 1]"]]
    assert row[3] == "1" and row[4].endswith("± 0.0100 d")
    # Holm's p values: those of the family alone, none smaller than the raw one.
    judged = [row for row in pairs if row["p_holm"]]
    assert {(row["arm"], row["of"], row["size"]) for row in judged} == {
        ("delta", "mean", "all"),
        ("hybrid", "mean", "all"),
    }
    assert all(float(row["p_holm"]) >= float(row["p"]) for row in judged)
    assert (
        f"The table holds {len(judged)} comparisons" in markdown
        and f"{len(pairs)} differences were computed" in markdown
    )


def test_what_is_missing_is_named(made, tmp_path):
    """Cells without results, unequal text, code, devices and models are said under Warnings; without them, none are."""
    ladder, cells, results = made
    assert "## Warnings" not in report(ladder, cells, results, tmp_path)[0]
    few = results[2:]
    few[0] = dataclasses.replace(few[0], corpora={"code": "ff" * 32})
    few[1] = dataclasses.replace(few[1], environment=few[1].environment | {"source": "ba9876543210", "device": "cpu"})
    few[2] = dataclasses.replace(few[2], non_embedding_parameters=16_000_000)
    markdown = report(ladder, cells, few, tmp_path)[0]
    warnings = markdown.split("## Warnings")[1].split("\n## ")[0]
    assert f"2 of {len(cells)} cells have no result: {cells[0].name}, {cells[1].name}" in warnings
    assert "different text called code" in warnings and "ffff" in warnings and "abab" not in warnings.split("ffff")[1]
    assert "Models of 15m differ in size: they have 15.42M to 16M non-embedding parameters" in warnings
    assert "different versions of the code" in warnings and "different devices" in warnings
    assert f"{len(cells) - 2} of {len(cells)} cells have results" in markdown


def test_parts_that_are_missing(made):
    """A headline needs all of its parts: a cell that lacks one is left out of it, and named."""
    ladder, _, results = made
    lacking = dataclasses.replace(results[0], figures=tuple(f for f in results[0].figures if f.of != "code"))
    gathered = Gathered(ladder, [lacking, *results[1:]])
    assert gathered.incomplete == {"heldout_nats_per_token": [lacking.name]}
    assert at(Differences(gathered), size="15m", arm="delta").seeds == 2


def test_unequal_documents_are_not_paired(made):
    """The difference has no error over documents, and a warning names the measure."""
    ladder, _, results = made
    key = "heldout_nats_per_token/code"
    other = dataclasses.replace(results[0], documents=results[0].documents | {key: results[0].documents[key][:-1]})
    found = differences(ladder, [other, *results[1:]])
    assert at(found, size="15m", arm="delta").stderr_documents is None
    assert at(found, size="30m", arm="delta").stderr_documents is not None
    assert any("heldout_nats_per_token of code" in text and "different documents" in text for text in found.mismatched)


def test_learning_rates(tmp_path):
    """A sweep has a table with the best rate; its other rates are in no other result."""
    sweep = {"sizes": ["15m"], "arms": ["delta"], "seeds": [0], "lr": [1e-3, 2e-3, 4e-3]}
    ladder, cells = make_ladder(tmp_path, [sweep, {"sizes": ["15m"], "arms": ["delta"], "seeds": [0, 1]}])
    markdown = report(ladder, cells, make_results(cells, TRUTH), tmp_path)[0]
    (table,) = [table for table in tables(markdown) if "learning rate" in table[0] and table[0][0] == "arm"]
    assert [(row[0], row[3], row[5], row[6]) for row in table[1:]] == [
        (f"gated DeltaNet {range_}", lr, mark, "0")
        for range_ in ("[-1, 1]", "[0, 1]")
        for lr, mark in (("0.001", ""), ("0.002", "best, used"), ("0.004", ""))
    ]
    assert at(differences(ladder, make_results(cells, TRUTH)), size=ALL, arm="delta").seeds == 2


def test_markdown_of_blocks():
    """A table keeps its columns whatever its cells hold, and columns of numbers are to the right."""
    table = Table(("arm", "loss", "interval"), (("a|b", "-1.5 ± 0.1 d", "[-1, 2]"), ("15m", "2", "-")))
    section = Section("A title", ["Text.", Heading("Part"), table, Bullets(("one", "two"))])
    markdown = to_markdown("Report", [section, Section("Long", ["hidden"], in_markdown=False)])
    assert tables(markdown) == [[list(table.columns), *map(list, table.rows)]]
    assert "| --- | ---: | ---: |" in markdown and "hidden" not in markdown
    assert markdown.startswith("# Report\n\n## A title\n\nText.\n\n### Part\n\n|") and markdown.endswith(
        "- one\n- two\n"
    )


def test_without_results(made, tmp_path):
    ladder, cells, _ = made
    markdown, rows, pairs = report(ladder, cells, [], tmp_path)
    assert f"None of the {len(cells)} cells has a result yet." in markdown and rows == pairs == []


@pytest.mark.parametrize(
    "value, text", [(308_411_392, "308.4M"), (15_420_000, "15.42M"), (1.3e9, "1.3B"), (950, "950")]
)
def test_counts(value, text):
    assert count(value) == text


def test_no_negative_zero():
    assert decimal(-0.00001, 4) == "0.0000" and decimal(-0.00001, 4, signed=True) == "0.0000"
    assert decimal(0.00123, 4, signed=True) == "+0.0012"
