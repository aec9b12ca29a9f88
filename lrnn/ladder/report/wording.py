"""How numbers and verdicts are written in the report."""

import math

from lrnn.ladder.measures import MEASURES
from lrnn.ladder.report.differences import Difference
from lrnn.ladder.report.fit import Estimate
from lrnn.ladder.report.intervals import Interval

ACCURACY = "accuracy"  # the unit of shares, which are written with three digits instead of four
NATS = "nats per token"  # the unit of the ladder's `effect`


def number(value: float, measure: str, signed: bool = False) -> str:
    """Return a value of a measure."""
    digits = 3 if MEASURES[measure].unit == ACCURACY else 4
    return decimal(value, digits, signed)


def decimal(value: float, digits: int, signed: bool = False) -> str:
    """Return a number with so many decimals, never -0."""
    value = round(value, digits) + 0.0
    return f"{value:{'+' if signed and value else ''}.{digits}f}"


def interval(found: Interval | Estimate | None, measure: str) -> str:
    """Return the ends of an interval, "-" if there is none."""
    if found is None or math.isnan(found.low):
        return "-"
    return f"[{number(found.low, measure, True)}, {number(found.high, measure, True)}]"


def count(value: float) -> str:
    """Return a number of tokens or parameters, such as 308M or 15.42M."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:g}"


def several(n: int, what: str) -> str:
    """Return a number of things, such as "1 pair" or "3 pairs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def probability(p: float | None) -> str:
    """Return a p value, "-" if there is none."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def verdict(difference: Difference, effect: float, first: str) -> str:
    """Return in words what a difference shows; `first` is what the other is subtracted from.

    A difference whose interval holds 0 is "equal within X": X is the end of the interval farther from 0.
    """
    measure = MEASURES[difference.quantity.measure]
    found = difference.interval
    if found is None:
        return "not decided: single seeds"
    alone = " (over seeds alone)" if difference.stderr_documents is None else ""
    small = measure.unit == NATS and found.bound <= effect
    if found.low == found.high == 0:
        return "equal in all pairs" + alone
    if found.p is None:
        return f"{number(difference.mean, difference.quantity.measure, True)} in all pairs, without scatter" + alone
    if found.holds_zero:
        # Rounded up, because X bounds the interval.
        digits = 3 if measure.unit == ACCURACY else 4
        within = math.ceil(found.bound * 10**digits) / 10**digits
        text = f"equal within {within:.{digits}f}"
        if measure.unit == NATS:
            text += f", less than {effect:g}" if small else f"; {effect:g} is not excluded"
        return text + alone
    is_better = (difference.mean < 0) == (measure.better == "low")
    text = f"{first} {'better' if is_better else 'worse'}"
    return text + (f", by less than {effect:g}" if small else "") + alone
