"""Fit the loss by parameters and tokens: one shape for all arms, and an offset for each arm and range.

    full       L = E + A / N^a + B / D^b + offset    (Chinchilla's form)
    path       L = E + A / N^a + offset              all runs have the same number of tokens per parameter, D = r N
    levels     L = level of the size and tokens + offset

N are non-embedding parameters, D tokens. The richest form that the grid can tell apart is fitted; three sizes are the
fewest for an exponent, and without them there is no extrapolation. The offsets are additive and the same at all sizes.

Intervals are percentiles of a bootstrap over seeds. A seed is drawn for all arms of a size together, which keeps the
pairs. Residuals are widened twice: by sqrt(n / (n - 1)), since n seeds lie closer to their own mean than to the true
one, and by the ratio of Student's quantile to the normal one, since few seeds tell little of the scatter. Sizes with
one seed borrow residuals of the others.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.special import ndtri, stdtrit

from lrnn.eval.statistics import INTERVAL, SEED

RESAMPLES = 400
HUBER = 0.01  # nats: residuals above count linearly, so that one spoilt run does not bend the shape
EXPONENTS = (0.02, 2.0)  # bounds
LOGARITHMS = (-20.0, 5.0)  # bounds of the logarithms of the terms' sizes in nats at the middle of the ladder
WIDEST_EXPONENT = 0.5  # an exponent whose interval is wider is not determined
STARTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
SAME_RATIO = 0.05  # tokens per parameter that differ by less count as equal
POINTS_OF_FULL = 6  # places (N, D); the shape has five parameters
AT_BOUND = 0.025  # part of the resamples from which a parameter at a bound is not determined
FORMS = {
    "full": "L = E + A / N^a + B / D^b + offset",
    "path": "L = E + A / N^a + offset",
    "levels": "L = level of the size and tokens + offset",
}

Kind = tuple[str, str]  # arm and range


@dataclass(frozen=True)
class Points:
    """Losses of one arm and range at one size and length, in nats, by seed."""

    level: tuple[str, int]  # size and tokens
    kind: Kind
    parameters: int
    tokens: int
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Estimate:
    """A number, and its 95% interval; NaN at both ends if there are no replicate seeds.

    `determined` is False if the data leave it open: resamples end at a bound of the search or far apart, or there are
    none.
    """

    value: float
    low: float
    high: float
    determined: bool = True


@dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
        form: key of `FORMS`.
        why: why it is no richer form, in words; empty for the full one.
        base: the arm and range whose offset is 0.
        shape: E, A, a, B, b, as far as the form has them.
        offsets: of the arms and ranges but the base, nats.
        between_ranges: offset of negative - positive by arm, nats.
        residual: root mean square of the residuals, nats.
        freedom: number of points minus that of parameters.
        predict: the loss of a kind with N parameters and D tokens; only the full form has it.
    """

    form: str
    why: str
    base: Kind
    shape: dict[str, Estimate]
    offsets: dict[Kind, Estimate]
    between_ranges: dict[str, Estimate]
    residual: float
    freedom: int
    predict: Callable[[Kind, float, float], Estimate] | None


def fit(points: list[Points], base: Kind, resamples: int = RESAMPLES) -> Fit | str:
    """Fit the richest form that the points can carry, or return in words why there is none.

    Args:
        points: of all arms, ranges, sizes and lengths.
        base: the arm and range whose offset is 0.
        resamples: of the bootstrap.
    """
    kinds = [base, *dict.fromkeys(p.kind for p in points if p.kind != base)]
    levels = list(dict.fromkeys(p.level for p in points))
    if len(levels) < 2:
        return "All runs have one size and one length, so there is nothing to fit."
    if np.linalg.matrix_rank(_levels(points, levels, kinds)) < len(levels) + len(kinds) - 1:
        return "Some arms share no size with the others, so that their offsets cannot be told from those of the sizes."
    form, why = _form(points)
    means = np.array([np.mean(list(p.by_seed.values())) for p in points])
    model = _Model(form, points, levels, kinds)
    if len(points) < model.size:
        form, why = "levels", f"There are {len(points)} points, fewer than a richer form has parameters."
        model = _Model(form, points, levels, kinds)
    best = model.solve(means)
    draws = np.array([model.solve(means + noise, best) for noise in _noise(points, resamples)])
    offsets = {kind: _estimate(best[model.at(kind)], _column(draws, model.at(kind))) for kind in kinds[1:]}
    predict = None
    if form == "full":

        def predict(kind: Kind, n: float, d: float) -> Estimate:
            drawn = np.array([model.loss(x, kind, n, d) for x in draws])
            return _estimate(model.loss(best, kind, n, d), drawn)

    return Fit(
        form, why, base, model.shape(best, draws), offsets, dict(_between_ranges(model, best, draws)),
        float(np.sqrt(np.mean(np.square(model.predicted(best) - means)))), len(points) - model.size, predict,
    )  # fmt: skip


def _form(points: list[Points]) -> tuple[str, str]:
    """Return the richest form that the places (N, D) can tell apart, and why it is no richer one."""
    sizes = {p.level[0] for p in points}
    if len(sizes) < 3:
        return "levels", f"An exponent needs three sizes, and there are {len(sizes)}."
    ratios = np.array([p.tokens / p.parameters for p in points])
    if ratios.max() / ratios.min() - 1 < SAME_RATIO:
        why = f"All runs have about {np.median(ratios):.0f} tokens per parameter, so that the terms of parameters and "
        return "path", why + "of tokens cannot be told apart: A and a are of both together."
    places, tokens = {p.level for p in points}, {p.tokens for p in points}
    if len(places) < POINTS_OF_FULL or len(tokens) < 3:
        why = f"The full form needs {POINTS_OF_FULL} pairs of size and tokens with three numbers of tokens, and there "
        return "levels", why + f"are {len(places)} with {len(tokens)}."
    return "full", ""


class _Model:
    """A form as a function of a vector: the shape, or the levels, and then the offsets of all kinds but the base.

    Parameters and tokens are taken relative to their geometric means, and A and B by their logarithms.
    """

    def __init__(self, form: str, points: list[Points], levels: list[tuple[str, int]], kinds: list[Kind]):
        self.form, self.kinds = form, kinds
        n, d = np.array([p.parameters for p in points], float), np.array([p.tokens for p in points], float)
        self._n0, self._d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
        self._logs = [np.log(n / self._n0), np.log(d / self._d0)][: {"full": 2, "path": 1, "levels": 0}[form]]
        self._weights = np.sqrt([len(p.by_seed) for p in points])
        design = _levels(points, levels, kinds)
        self._kinds = design[:, len(levels) :]  # [points, kinds - 1], 0 or 1
        self._linear = design if form == "levels" else np.concatenate([np.ones((len(points), 1)), self._kinds], 1)
        self.first = len(levels) if form == "levels" else 1 + 2 * len(self._logs)  # place of the first offset
        self.size = self.first + len(kinds) - 1

    def at(self, kind: Kind) -> int:
        """Return the place of the offset of a kind other than the base."""
        return self.first + self.kinds.index(kind) - 1

    def solve(self, losses: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Return the vector that fits losses [points] best, from a start or the best point of a grid of exponents."""
        if self.form == "levels":
            return np.linalg.lstsq(self._linear * self._weights[:, None], losses * self._weights, rcond=None)[0]
        low, high = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        low[0] = 0
        for i in range(len(self._logs)):
            low[1 + 2 * i], high[1 + 2 * i] = LOGARITHMS
            low[2 + 2 * i], high[2 + 2 * i] = EXPONENTS
        start = self._start(losses) if start is None else start
        return least_squares(
            lambda x: (self.predicted(x) - losses) * self._weights,
            np.clip(start, low, high),
            lambda x: self._jacobian(x) * self._weights[:, None],
            bounds=(low, high), loss="huber", f_scale=HUBER, x_scale="jac", max_nfev=300,
        ).x  # fmt: skip

    def predicted(self, x: np.ndarray) -> np.ndarray:
        """Return the losses at the points, [points]."""
        if self.form == "levels":
            return self._linear @ x
        powers = sum(np.exp(x[1 + 2 * i] - x[2 + 2 * i] * log) for i, log in enumerate(self._logs))
        return x[0] + powers + self._kinds @ x[self.first :]

    def loss(self, x: np.ndarray, kind: Kind, n: float, d: float) -> float:
        """Return the loss of a kind with n parameters and d tokens, by the full form."""
        offset = 0.0 if kind == self.kinds[0] else x[self.at(kind)]
        logs = (math.log(n / self._n0), math.log(d / self._d0))
        return float(x[0] + sum(np.exp(x[1 + 2 * i] - x[2 + 2 * i] * log) for i, log in enumerate(logs)) + offset)

    def shape(self, best: np.ndarray, draws: np.ndarray) -> dict[str, Estimate]:
        """Return the parameters of the shape; A and B for N and D themselves."""
        if self.form == "levels":
            return {}
        found = {"E": _estimate(best[0], _column(draws, 0), bounds=(0, math.inf))}
        for i, (name, scale) in enumerate([("A", self._n0), ("B", self._d0)][: len(self._logs)]):
            exponent = _estimate(best[2 + 2 * i], _column(draws, 2 + 2 * i), EXPONENTS, WIDEST_EXPONENT)
            with np.errstate(over="ignore"):
                factor = np.exp(best[1 + 2 * i] + best[2 + 2 * i] * np.log(scale))
                factors = np.exp(_column(draws, 1 + 2 * i) + _column(draws, 2 + 2 * i) * np.log(scale))
            estimate = _estimate(factor, factors)
            found[name] = Estimate(estimate.value, estimate.low, estimate.high, exponent.determined)
            found[name.lower()] = exponent
        return found

    def _start(self, losses: np.ndarray) -> np.ndarray:
        """Return the best point of a grid of exponents, at which all else is linear."""
        best, error = np.zeros(self.size), np.inf
        for exponents in np.array(np.meshgrid(*[STARTS] * len(self._logs))).reshape(len(self._logs), -1).T:
            powers = [np.exp(-a * log) for a, log in zip(exponents, self._logs, strict=True)]
            design = np.column_stack([self._linear[:, 0], *powers, self._kinds]) * self._weights[:, None]
            found = np.linalg.lstsq(design, losses * self._weights, rcond=None)[0]
            if (found[1 : 1 + len(powers)] <= 0).any():
                continue
            this = float(np.square(design @ found - losses * self._weights).sum())
            if this < error:
                shape = [x for pair in zip(np.log(found[1 : 1 + len(powers)]), exponents, strict=True) for x in pair]
                best, error = np.array([found[0], *shape, *found[1 + len(powers) :]]), this
        if not np.isfinite(error):  # losses that rise with size: start flat, and let the bounds show it
            best[0], best[2 : self.first : 2] = losses.min(), STARTS[0]
            best[1 : self.first : 2] = np.log(1e-3)
        return best

    def _jacobian(self, x: np.ndarray) -> np.ndarray:
        """Return the derivatives of the predicted losses, [points, size]."""
        columns = [np.ones(len(self._weights))]
        for i, log in enumerate(self._logs):
            power = np.exp(x[1 + 2 * i] - x[2 + 2 * i] * log)
            columns += [power, -log * power]
        return np.column_stack([*columns, self._kinds])


def _levels(points: list[Points], levels: list[tuple[str, int]], kinds: list[Kind]) -> np.ndarray:
    """Return the design of the levels and of the offsets of all kinds but the first, [points, levels + kinds - 1]."""
    rows = [[p.level == level for level in levels] + [p.kind == kind for kind in kinds[1:]] for p in points]
    return np.array(rows, dtype=float)


def _noise(points: list[Points], resamples: int) -> Iterator[np.ndarray]:
    """Yield errors of the means of the points, [points], by drawing seeds; none if no point has two seeds."""
    rows: dict[tuple[str, int], list[dict[Kind, float]]] = {}  # residuals of a seed by kind
    levels = list(dict.fromkeys(p.level for p in points))
    df = sum(max(len(p.by_seed) for p in points if p.level == level) - 1 for level in levels)
    if df == 0:
        return
    student = float(stdtrit(df, INTERVAL[1]) / ndtri(INTERVAL[1]))
    for level in levels:
        by_seed: dict[int, dict[Kind, float]] = {}
        for p in (p for p in points if p.level == level and len(p.by_seed) > 1):
            n, mean = len(p.by_seed), np.mean(list(p.by_seed.values()))
            for seed, value in p.by_seed.items():
                by_seed.setdefault(seed, {})[p.kind] = float((value - mean) * math.sqrt(n / (n - 1)) * student)
        rows[level] = list(by_seed.values())
    everything = [row for of_level in rows.values() for row in of_level]
    single = [residual for row in everything for residual in row.values()]
    rng = np.random.default_rng(SEED)
    for _ in range(resamples):
        drawn = {}
        for level, of_level in rows.items():
            pool = of_level or everything
            slots = max(len(p.by_seed) for p in points if p.level == level)
            drawn[level] = [pool[i] for i in rng.integers(len(pool), size=slots)]
        noise = []
        for p in points:
            found = [row[p.kind] for row in drawn[p.level] if p.kind in row]
            noise.append(np.mean(found or rng.choice(single, size=len(p.by_seed))))
        yield np.array(noise)


def _between_ranges(model: _Model, best: np.ndarray, draws: np.ndarray) -> Iterator[tuple[str, Estimate]]:
    for arm in dict.fromkeys(arm for arm, _ in model.kinds):
        kinds = [(arm, "negative"), (arm, "positive")]
        if all(kind in model.kinds for kind in kinds):
            sides = [
                (0.0, np.zeros(len(draws)))
                if kind == model.kinds[0]
                else (best[model.at(kind)], _column(draws, model.at(kind)))
                for kind in kinds
            ]
            yield arm, _estimate(sides[0][0] - sides[1][0], sides[0][1] - sides[1][1])


def _column(draws: np.ndarray, i: int) -> np.ndarray:
    return draws[:, i] if len(draws) else np.zeros(0)


def _estimate(
    value: float,
    draws: np.ndarray,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    widest: float = math.inf,
) -> Estimate:
    """Return a value with the percentiles of its draws.

    It is determined if the draws keep off the bounds and their interval is not wider than `widest`.
    """
    if not len(draws):
        return Estimate(float(value), math.nan, math.nan, determined=False)
    low, high = (float(q) for q in np.quantile(draws, INTERVAL))
    at_bound = (draws <= bounds[0] + 1e-3) | (draws >= bounds[1] - 1e-3) | ~np.isfinite(draws)
    return Estimate(float(value), low, high, bool(at_bound.mean() < AT_BOUND) and high - low <= widest)
