"""Differences between ranges and between arms, paired by seed and by document.

A pair are two cells of the same size, tokens and seed: they share the order of the data, and, between ranges, the
initial weights. Their differences scatter less than the cells do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lrnn.eval.statistics import aggregate
from lrnn.ladder.measures import BYTES, MEASURES, MIX, NATS
from lrnn.ladder.report.gathered import RANGE_ORDER, Gathered, Group, Quantity
from lrnn.ladder.report.intervals import Interval, Scatter, both_errors, scatter, student
from lrnn.ladder.results import CellResult
from lrnn.track.grid import NO_RANGE

ALL = "all"
BETWEEN_RANGES = "negative - positive"

Pair = tuple[CellResult, CellResult]  # the second is subtracted from the first


@dataclass(frozen=True)
class Place:
    """Where two things are compared: `size` and `arm` may be `ALL`, and `tokens` is None over several lengths.

    Arms are compared in the same range. If one of the two arms has none, it is compared with each range of the other.
    """

    contrast: str  # BETWEEN_RANGES, or "arm - reference"
    size: str
    arm: str
    range: str  # of the arm, or "" between ranges
    against: str  # the range of the reference, or "" between ranges
    tokens: int | None


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, with what is known of its error.

    Attributes:
        place, quantity: what is compared where.
        mean: over pairs.
        seeds: number of pairs.
        own: scatter of the pairs about the means of their groups, without those of other places; None without two
            pairs in a group.
        own_interval: Student's interval by `own`.
        pooled: scatter of all places of the same contrast and quantity.
        stderr_documents: paired over documents, averaged over the pairs first; None if values by document are lacking.
        documents: their number.
        interval: by `pooled` and `stderr_documents` together; None without pooled scatter, because documents do not
            tell how another seed would fare.
    """

    place: Place
    quantity: Quantity
    mean: float
    seeds: int
    own: Scatter | None
    own_interval: Interval | None
    pooled: Scatter | None
    stderr_documents: float | None
    documents: int | None
    interval: Interval | None

    @property
    def stderr_own(self) -> float | None:
        """Return the standard error over seeds by the scatter of this place alone."""
        return None if self.own is None else self.own.deviation / self.seeds**0.5

    @property
    def stderr_pooled(self) -> float | None:
        """Return the standard error over seeds by the pooled scatter."""
        return None if self.pooled is None else self.pooled.deviation / self.seeds**0.5


class Differences:
    """All differences of a ladder, and the pairs of documents that do not fit together.

    Attributes:
        all: the differences of all quantities whose measure is better high or low, the headlines first. The mix of
            domains is a headline.
        mismatched: pairs of cells whose values by document have different numbers of documents, said in words.
    """

    def __init__(self, gathered: Gathered):
        self._gathered = gathered
        self.mismatched: dict[str, None] = {}
        self.all: list[Difference] = []
        judged = [q for q in gathered.quantities if MEASURES[q.measure].better is not None and q.of != MIX]
        contrasts = [BETWEEN_RANGES, *(f"{arm} - {gathered.ladder.reference}" for arm in self._other_arms())]
        for quantity in [*gathered.headlines, *judged]:
            for contrast in contrasts:
                self.all += self._of(contrast, quantity)

    def headlines(self, contrast: str | None = None) -> list[Difference]:
        """Return the differences of headlines, of one contrast or of all."""
        return [d for d in self.all if d.quantity in self._gathered.headlines and contrast in (None, d.place.contrast)]

    def family(self) -> list[Difference]:
        """Return the differences between ranges that Holm's adjustment counts: each arm over all its sizes."""
        return [d for d in self.headlines(BETWEEN_RANGES) if d.place.size == ALL and d.place.arm != ALL]

    def _other_arms(self) -> list[str]:
        reference = self._gathered.ladder.reference
        found = dict.fromkeys(group.arm for group in self._gathered.measured)
        return [arm for arm in found if arm != reference] if reference is not None else []

    def _of(self, contrast: str, quantity: Quantity) -> Iterator[Difference]:
        """Yield a quantity's differences by group, then over the sizes of an arm, then over all arms."""
        pairs, values = {}, {}
        for place, first, second in self._places(contrast):
            if found := self._gathered.paired(first, second, quantity):
                pairs[place] = found
                values[place] = self._gathered.differences(first, second, quantity)
        pooled = self._pooled(values)
        for place in pairs:
            yield self._difference(place, quantity, [place], pairs, values, pooled[place])
        arms: dict[tuple[str, str, str], list[Place]] = {}
        for place in pairs:
            arms.setdefault((place.arm, place.range, place.against), []).append(place)
        for kind, members in arms.items():
            over = Place(contrast, ALL, *kind, _common([place.tokens for place in members]))
            yield self._difference(over, quantity, members, pairs, values, pooled[members[0]])
        if contrast == BETWEEN_RANGES and len(arms) > 1:
            over = Place(contrast, ALL, ALL, "", "", _common([place.tokens for place in pairs]))
            yield self._difference(over, quantity, list(pairs), pairs, values, pooled[next(iter(pairs))])

    def _pooled(self, values: dict[Place, list[float]]) -> dict[Place, Scatter | None]:
        """Return the pooled scatter of each place. Places that share runs are not pooled: they are not independent."""
        return {
            place: scatter(
                [
                    values[other]
                    for other in values
                    if place.range == place.against or (other.range, other.against) == (place.range, place.against)
                ]
            )
            for place in values
        }

    def _places(self, contrast: str) -> Iterator[tuple[Place, Group, Group]]:
        """Yield the places of a contrast, with the two groups."""
        reference = str(self._gathered.ladder.reference)
        for group in self._gathered.measured:
            if contrast == BETWEEN_RANGES:
                second = self._gathered.partner(group, group.arm, "positive")
                if group.range == "negative" and second is not None:
                    yield Place(contrast, group.size, group.arm, "", "", group.tokens), group, second
            elif contrast == f"{group.arm} - {reference}":
                for against in RANGE_ORDER:
                    second = self._gathered.partner(group, reference, against)
                    if second is not None and (against == group.range or NO_RANGE in (against, group.range)):
                        yield Place(contrast, group.size, group.arm, group.range, against, group.tokens), group, second

    def _difference(
        self,
        place: Place,
        quantity: Quantity,
        members: list[Place],
        pairs: dict[Place, list[Pair]],
        values: dict[Place, list[float]],
        pooled: Scatter | None,
    ) -> Difference:
        differences = [value for member in members for value in values[member]]
        mean, n = float(np.mean(differences)), len(differences)
        own = scatter([values[member] for member in members])
        own_interval = None if own is None else student(mean, own.deviation / n**0.5, own.df)
        by_documents = self._over_documents(quantity, [pair for member in members for pair in pairs[member]])
        stderr_documents, documents = (None, None) if by_documents is None else by_documents
        of_documents = None if stderr_documents is None or documents is None else (stderr_documents, documents - 1)
        interval = None if pooled is None else both_errors(mean, (pooled.deviation / n**0.5, pooled.df), of_documents)
        return Difference(place, quantity, mean, n, own, own_interval, pooled, stderr_documents, documents, interval)

    def _over_documents(self, quantity: Quantity, pairs: list[Pair]) -> tuple[float, int] | None:
        """Return the standard error over documents of the mean difference, and the number of documents.

        The parts of a headline have documents of their own, so that their errors are independent.
        """
        variance, documents = 0.0, 0
        for part, weight in self._gathered.parts(quantity).items():
            found = self._documents(part, pairs)
            if found is None or found.shape[2] < 2:
                return None
            variance += (weight * paired_stderr(MEASURES[part.measure].aggregate, found)) ** 2
            documents += found.shape[2]
        return variance**0.5, documents

    def _documents(self, quantity: Quantity, pairs: list[Pair]) -> np.ndarray | None:
        """Return the values by document, [2, pairs, n] or [2, pairs, n, 2], or None if some are lacking or differ."""
        arrays: list[list[np.ndarray]] = [[], []]
        for pair in pairs:
            for side, result in zip(arrays, pair, strict=True):
                figure = self._gathered.figure(result, quantity)
                if figure is None or figure.documents is None:
                    return None
                side.append(result.documents[figure.documents])
        shapes = {array.shape for side in arrays for array in side}
        if len(shapes) > 1:
            names = f"{pairs[0][0].name} and other cells"
            self.mismatched[f"{quantity.measure} of {quantity.of}: {names} were measured on different documents"] = None
            return None
        return np.array(arrays)


def paired_stderr(metric: str, values: np.ndarray) -> float:
    """Return the standard error over documents of the mean over pairs of first - second; the pairs share documents.

    It is the closed form to which the bootstrap over documents converges: of a ratio of sums, by its linear part.

    Args:
        metric: `BYTES` or `NATS`, ratios of sums; anything else is a mean.
        values: float64 [2, pairs, n] or, for ratios, [2, pairs, n, 2].
    """
    if metric in (BYTES, NATS):
        sums = values.sum(2, keepdims=True)
        ratio = sums[..., 0] / sums[..., 1]  # [2, pairs, 1]
        # What a document adds to the ratio, times n; the metric is the ratio times a constant.
        parts = (values[..., 0] - ratio * values[..., 1]) / sums[..., 1] * values.shape[2]
        values = parts * (aggregate(metric, values)[..., None] / ratio)
    by_document = (values[0] - values[1]).mean(0)
    return float(by_document.std(ddof=1) / len(by_document) ** 0.5)


def _common(tokens: Sequence[int | None]) -> int | None:
    """Return the number that all have in common, or None."""
    return tokens[0] if len(set(tokens)) == 1 else None
