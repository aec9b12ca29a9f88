"""Put a ladder's results in order: groups that differ by seed alone, and in each the figures by seed."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lrnn.ladder.config import LadderConfig
from lrnn.ladder.measures import ALL, MEASURES, MIX
from lrnn.ladder.results import CellResult, Figure

# What the question is judged by, one number each: the mean over everything that the measure was taken of and at, of
# held-out text by the weights of the domains. They are fixed here, before any run, and Holm's adjustment counts them.
# Other differences are looked at, not judged.
HEADLINES = (
    "heldout_nats_per_token", "gold_bits_per_byte", "traces_accuracy", "recall_accuracy", "recall_bits_per_byte",
    "needle_accuracy", "needle_bits_per_byte",
)  # fmt: skip
MEAN = "mean"  # `of` of a headline
RANGE_ORDER = ("negative", "positive", "none")


@dataclass(frozen=True)
class Group:
    """Cells that differ by seed alone; `tokens` are those trained on, `lr` is the peak learning rate."""

    size: str
    arm: str
    range: str
    tokens: int
    lr: float


@dataclass(frozen=True)
class Quantity:
    """What a figure is about: a measure, and what it was taken of and at.

    Headlines are of `MEAN`, at None; of `MEAN` at some place is the mean over all kinds there.
    """

    measure: str
    of: str
    at: float | None


class Gathered:
    """Results by group and seed, in the order of the ladder's sizes, tokens, arms and ranges.

    Attributes:
        ladder: the configuration.
        groups: the results of each group by seed, ascending.
        measured: the groups at their size's own learning rate. All but the sweep is about these.
        quantities: all quantities of the measured groups, in the order of `MEASURES`, then as the figures have them.
        incomplete: for each headline that some results lack a part of, the names of their cells.
    """

    def __init__(self, ladder: LadderConfig, results: Iterable[CellResult]):
        self.ladder = ladder
        by_group: dict[Group, dict[int, CellResult]] = defaultdict(dict)
        for result in results:
            group = Group(result.size, result.arm, result.range, result.tokens, result.lr)
            by_group[group][result.seed] = result
        sizes, arms = list(ladder.sizes), list(ladder.arms)

        def place(group: Group) -> tuple[int, int, int, int, float]:
            range_ = RANGE_ORDER.index(group.range)
            return sizes.index(group.size), group.tokens, arms.index(group.arm), range_, group.lr

        self.groups = {group: dict(sorted(by_group[group].items())) for group in sorted(by_group, key=place)}
        self.measured = {g: seeds for g, seeds in self.groups.items() if g.lr == ladder.sizes[g.size].lr}
        self._figures: dict[str, dict[Quantity, Figure]] = {
            result.name: {Quantity(f.measure, f.of, f.at): f for f in result.figures}
            for seeds in self.groups.values()
            for result in seeds.values()
        }
        measured = [self._figures[result.name] for seeds in self.measured.values() for result in seeds.values()]
        found = dict.fromkeys(quantity for figures in measured for quantity in figures)
        order = {name: i for i, name in enumerate(MEASURES)}
        self.quantities = sorted(found, key=lambda q: order[q.measure])
        self._parts = {name: self._weighted(name) for name in HEADLINES}
        self.incomplete = self._find_incomplete()

    @property
    def headlines(self) -> list[Quantity]:
        """Return the headlines of which there is any figure."""
        return [Quantity(name, MEAN, None) for name in HEADLINES if self._parts[name]]

    @property
    def results(self) -> list[CellResult]:
        """Return all results, in order."""
        return [result for seeds in self.groups.values() for result in seeds.values()]

    def parts(self, quantity: Quantity) -> dict[Quantity, float]:
        """Return the quantities of which a quantity is the mean, with weights that sum to 1: itself if of no mean."""
        if quantity.of != MEAN:
            return {quantity: 1.0}
        if quantity.at is None:
            return self._parts[quantity.measure]
        kinds = [q for q in self.quantities if (q.measure, q.at) == (quantity.measure, quantity.at)]
        kinds = [q for q in kinds if q.of not in (ALL, MIX)]
        return dict.fromkeys(kinds, 1 / len(kinds))

    def value(self, result: CellResult, quantity: Quantity) -> float | None:
        """Return a result's value of a quantity, None if it has none. A headline needs all of its parts."""
        total = 0.0
        for part, weight in self.parts(quantity).items():
            figure = self._figures[result.name].get(part)
            if figure is None:
                return None
            total += weight * figure.value
        return total

    def stderr(self, result: CellResult, quantity: Quantity) -> float | None:
        """Return a value's standard error over documents, None if there is none. Parts have documents of their own."""
        parts = self.parts(quantity).items()
        found = [(self._figures[result.name].get(part), weight) for part, weight in parts]
        errors = [weight * f.stderr for f, weight in found if f is not None and f.stderr is not None]
        return sum(error**2 for error in errors) ** 0.5 if errors and len(errors) == len(found) else None

    def values(self, group: Group, quantity: Quantity) -> dict[int, float]:
        """Return the values of a quantity by seed, for the seeds that have one."""
        found = {seed: self.value(result, quantity) for seed, result in self.groups[group].items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def partner(self, group: Group, arm: str, range_: str) -> Group | None:
        """Return the measured group with another arm or range and the same size, tokens and learning rate."""
        other = Group(group.size, arm, range_, group.tokens, group.lr)
        return other if other in self.measured else None

    def paired(self, first: Group, second: Group, quantity: Quantity) -> list[tuple[CellResult, CellResult]]:
        """Return the results of two groups by pairs of the same seed, both of which have the quantity."""
        pairs = (
            (a, self.groups[second][seed]) for seed, a in self.groups[first].items() if seed in self.groups[second]
        )
        return [pair for pair in pairs if all(self.value(result, quantity) is not None for result in pair)]

    def differences(self, first: Group, second: Group, quantity: Quantity) -> list[float]:
        """Return first - second by pairs of the same seed."""
        ours, theirs = self.values(first, quantity), self.values(second, quantity)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def figure(self, result: CellResult, quantity: Quantity) -> Figure | None:
        """Return a result's figure of a quantity that is no headline."""
        return self._figures[result.name].get(quantity)

    def _weighted(self, measure: str) -> dict[Quantity, float]:
        """Return the parts of a headline with their weights."""
        parts = [q for q in self.quantities if q.measure == measure and q.of not in (ALL, MIX)]
        by_domain = {domain.name: domain.weight for domain in self.ladder.measure.heldout}
        heldout = measure.startswith("heldout")
        weights = [by_domain[part.of] if heldout else 1.0 for part in parts]
        return {part: weight / sum(weights) for part, weight in zip(parts, weights, strict=True) if weight > 0}

    def _find_incomplete(self) -> dict[str, list[str]]:
        lacking = {
            quantity.measure: [
                result.name
                for seeds in self.measured.values()
                for result in seeds.values()
                if self.value(result, quantity) is None
            ]
            for quantity in self.headlines
        }
        return {measure: names for measure, names in lacking.items() if names}
