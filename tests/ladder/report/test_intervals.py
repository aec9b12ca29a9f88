"""Test intervals and adjustments against tables, calculations by hand and simulations."""

import math

import numpy as np
import pytest

from lrnn.ladder.report.intervals import both_errors, holm, scatter, student
from lrnn.ladder.report.trend import trend


@pytest.mark.parametrize(
    "df, t", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (8, 2.3060), (20, 2.0860), (math.inf, 1.95996)]
)
def test_student_against_the_table(df, t):
    """The quantiles are those of the printed table, and at them the p value is 0.05."""
    interval = student(1.0, 0.5, df)
    assert (interval.low, interval.high) == pytest.approx((1 - 0.5 * t, 1 + 0.5 * t), abs=1e-4)
    assert student(t * 0.5, 0.5, df).p == pytest.approx(0.05, abs=1e-5)
    assert student(-t * 0.5, 0.5, df).p == pytest.approx(0.05, abs=1e-5)


def test_no_scatter():
    """Values that are all 0 are equal; others without scatter have no p value."""
    assert student(0.0, 0.0, 3).p == 1.0 and student(0.0, 0.0, 3).holds_zero
    assert student(0.1, 0.0, 3).p is None and not student(0.1, 0.0, 3).holds_zero


def test_pooled_scatter_by_hand():
    """(1, 3), (0, 0, 3) and a single value: squares 2 + 6 over 1 + 2 degrees of freedom."""
    pooled = scatter([[1, 3], [0, 0, 3], [7]])
    assert pooled.df == 3 and pooled.deviation == pytest.approx((8 / 3) ** 0.5)
    assert scatter([[1], [2], []]) is None


def test_holm_by_hand():
    """The smallest of 4 counts 4 times, the next 3 times; adjusted values never fall, and none exceeds 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.01, None]) == [0.01, None]
    assert holm([]) == []


def test_both_errors_by_hand():
    """Variances add: 3 and 4 make 5, with 625 / (81 / 20 + 256 / 8) degrees of freedom."""
    interval = both_errors(0.0, (3.0, 20), (4.0, 8))
    df = 625 / (81 / 20 + 256 / 8)
    assert interval.high == pytest.approx(student(0.0, 5.0, df).high) == -interval.low
    # Two seeds that agree are not made surer by many documents.
    assert both_errors(0.0, (3.0, 1), (3.0, 1000)) == student(0.0, 3.0, 1)
    assert both_errors(0.0, (3.0, 2), None) == student(0.0, 3.0, 2)


def test_coverage():
    """Intervals over 3 seeds and 40 documents hold the true difference in 94.5% of trials or more, and are not vain."""
    rng = np.random.default_rng(0)
    trials, seeds, n = 4000, 3, 40
    hits = 0
    widths = []
    for _ in range(trials):
        by_seed, by_document = rng.normal(0, 0.01, (seeds, 1)), rng.normal(0, 0.08, n)
        values = 0.02 + by_seed + by_document + rng.normal(0, 0.05, (seeds, n))
        spread = scatter([values.mean(1).tolist()])
        document = values.mean(0).std(ddof=1) / n**0.5
        interval = both_errors(values.mean(), (spread.deviation / seeds**0.5, spread.df), (document, n - 1))
        hits += interval.low <= 0.02 <= interval.high
        widths.append(interval.high - interval.low)
    assert 0.945 < hits / trials < 0.985
    truth = (0.01**2 / seeds + 0.08**2 / n + 0.05**2 / seeds / n) ** 0.5
    assert np.median(widths) / 2 < 2.5 * truth


def test_trend():
    """The line is that of least squares; its intervals hold a true slope in 95% of trials."""
    exact = trend([(10**7, [0.1, 0.1001]), (10**8, [0.2, 0.2001]), (10**9, [0.3, 0.3001])], 1e10)
    assert exact.slope == pytest.approx(0.1) and exact.target == pytest.approx(0.40005)
    rng = np.random.default_rng(0)
    hits = np.zeros(2)
    for _ in range(1500):
        pairs = [(n, (0.001 * math.log10(n) + rng.normal(0, 0.003, 3)).tolist()) for n in (15e6, 30e6, 60e6)]
        found = trend(pairs, 1.3e9)
        hits += (
            found.of_slope.low <= 0.001 <= found.of_slope.high,
            found.at_target.low <= 0.001 * math.log10(1.3e9) <= found.at_target.high,
        )
    assert np.all((hits / 1500 > 0.93) & (hits / 1500 < 0.97))


def test_no_trend_without_two_sizes_or_seeds():
    assert trend([(10**7, [0.1, 0.2])], 1e9) is None
    assert trend([(10**7, [0.1]), (10**8, [0.2])], 1e9) is None
    assert trend([(10**7, [0.1, 0.2]), (10**8, [0.2])], 1e9).at_target is None
