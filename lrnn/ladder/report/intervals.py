"""Intervals of means of few values: Student's t, scatter pooled over groups, two sources of error, Holm's adjustment.

All intervals are two-sided with a level of 95%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The 95% interval of a mean, and the probability of a mean at least as far from 0 if the true one is 0.

    `p` is None where there is no scatter at all but a mean other than 0: the values cannot say how sure they are.
    """

    low: float
    high: float
    p: float | None

    @property
    def holds_zero(self) -> bool:
        """Return whether 0 lies inside."""
        return self.low <= 0 <= self.high

    @property
    def bound(self) -> float:
        """Return the largest distance from 0 of a value inside."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Scatter:
    """A standard deviation of single values, and its degrees of freedom, at least 1."""

    deviation: float
    df: int


def student(mean: float, stderr: float, df: float) -> Interval:
    """Return the t interval of a mean with a standard error of `df` degrees of freedom (infinite: the normal one)."""
    if stderr == 0:
        return Interval(mean, mean, 1.0 if mean == 0 else None)
    # stdtrit and stdtr take no infinite degrees of freedom in all versions; 1e12 is normal to 12 digits.
    df = min(df, 1e12)
    half = float(stdtrit(df, 0.5 + LEVEL / 2)) * stderr
    return Interval(mean - half, mean + half, 2 * float(stdtr(df, -abs(mean) / stderr)))


def scatter(groups: Sequence[Sequence[float]]) -> Scatter | None:
    """Return the scatter of values about the means of their groups, pooled over groups; None if no group has two."""
    df = sum(len(group) - 1 for group in groups if group)
    if df == 0:
        return None
    squares = sum(float(np.square(np.asarray(group) - np.mean(group)).sum()) for group in groups if group)
    return Scatter(math.sqrt(squares / df), df)


def both_errors(mean: float, seeds: tuple[float, float], documents: tuple[float, float] | None) -> Interval:
    """Return the interval of a mean whose error has two independent sources, each a (standard error, df).

    The variances add up, with the degrees of freedom of Welch and Satterthwaite. Seeds that share their documents
    also scatter by what a seed does on single documents, which the documents' error holds too: it counts twice, so
    that the interval is wide rather than narrow. It is never narrower than that of the seeds alone, which it would be
    where few seeds happen to agree and the many documents lend them their degrees of freedom.
    """
    alone = student(mean, *seeds)
    if documents is None or documents[0] == 0:
        return alone
    variance = seeds[0] ** 2 + documents[0] ** 2
    df = variance**2 / sum(stderr**4 / df for stderr, df in (seeds, documents))
    both = student(mean, math.sqrt(variance), df)
    return alone if alone.high > both.high else both


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for their number by Holm's step-down method, in the same order.

    A value of None counts among the comparisons as the smallest, and stays None.
    """
    ranked = [-1.0 if value is None else value for value in p]
    order = sorted(range(len(p)), key=ranked.__getitem__)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        value = p[i]
        if value is not None:
            largest = max(largest, min(1.0, value * (len(p) - rank)))
            adjusted[i] = largest
    return adjusted
