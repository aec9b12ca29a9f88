"""A chi-square test that needs no statistics package."""

from collections import Counter


def assert_distributed(values, probabilities):
    """Check that all values (a list) are keys of `probabilities`, and as frequent as these say (within 4 sigma)."""
    counts = Counter(values)
    assert set(counts) <= set(probabilities)
    statistic = sum((counts[v] - len(values) * p) ** 2 / (len(values) * p) for v, p in probabilities.items())
    freedom = len(probabilities) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 2  # + 2, because the tail is fat with one degree of freedom
