"""How a difference changes with size: a line through the pairs over the logarithm of the parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lrnn.ladder.report.intervals import Interval, scatter, student

FEWEST_TO_EXTRAPOLATE = 3  # sizes: with two, nothing shows whether a line fits


@dataclass(frozen=True)
class Trend:
    """The change of a difference per tenfold parameters, and the difference at a larger size, each with its interval.

    `at_target` is None with fewer than three sizes.
    """

    slope: float
    of_slope: Interval
    target: float
    at_target: Interval | None


def trend(pairs: Sequence[tuple[int, Sequence[float]]], target: float) -> Trend | None:
    """Fit the line through (parameters, differences by seed) by least squares, and continue it to `target` parameters.

    The error is the scatter of the pairs about the means of their sizes. None with one size, or without scatter.
    """
    noise = scatter([values for _, values in pairs])
    sizes = {n for n, _ in pairs}
    if noise is None or len(sizes) < 2:
        return None
    y = np.array([value for _, values in pairs for value in values])
    x = np.array([math.log10(n) for n, values in pairs for _ in values])
    design = np.column_stack([np.ones_like(x), x - x.mean()])
    covariance = np.linalg.inv(design.T @ design) * noise.deviation**2
    level, slope = np.linalg.lstsq(design, y, rcond=None)[0]
    there = np.array([1.0, math.log10(target) - x.mean()])
    expected = float(there @ [level, slope])
    error = float(np.sqrt(there @ covariance @ there))
    at_target = student(expected, error, noise.df) if len(sizes) >= FEWEST_TO_EXTRAPOLATE else None
    return Trend(float(slope), student(float(slope), float(covariance[1, 1] ** 0.5), noise.df), expected, at_target)
