"""The section on the fit of loss by parameters and tokens, and on what it says of a larger model."""

from lrnn.ladder.report.document import Block, Bullets, Section, Table
from lrnn.ladder.report.fit import FORMS, Estimate, Fit, Points, fit
from lrnn.ladder.report.gathered import MEAN, Gathered, Quantity
from lrnn.ladder.report.protocol import arm_title
from lrnn.ladder.report.trend import Trend, trend
from lrnn.ladder.report.wording import decimal, interval

LOSS = "heldout_nats_per_token"
TARGET = (1.3e9, 100e9)  # parameters and tokens
TARGET_NAME = "1.3B parameters and 100B tokens"
WIDEST = 0.2  # nats: a loss whose interval is wider is not given
WIDEST_DIFFERENCE = 0.05  # nats: the same for a difference of ranges


def scaling(gathered: Gathered) -> Section | None:
    """Return the section, or None if no held-out loss was measured."""
    headline = Quantity(LOSS, MEAN, None)
    if headline not in gathered.headlines:
        return None
    points = []
    for group, seeds in gathered.measured.items():
        if values := gathered.values(group, headline):
            one = next(iter(seeds.values()))
            kind = (group.arm, group.range)
            points.append(Points((group.size, group.tokens), kind, one.non_embedding_parameters, group.tokens, values))
    reference = gathered.ladder.reference
    kinds = list(dict.fromkeys(p.kind for p in points))
    if not kinds:
        return None
    kinds.sort(key=lambda kind: (kind[0] != reference, kind[1] != "positive"))
    found = fit(points, kinds[0])
    if isinstance(found, str):
        return Section("Fit", [found, f"So the ladder says nothing of {TARGET_NAME}."])
    blocks = [*_fitted(gathered, found), *_trends(gathered)]
    return Section("Fit", blocks)


def _fitted(gathered: Gathered, found: Fit) -> list[Block]:
    has_draws = any(estimate.low == estimate.low for estimate in found.offsets.values())
    text = (
        f"{FORMS[found.form]}, fitted to the held-out loss in nats per token, with N non-embedding parameters, D "
        f"tokens and the offset of {arm_title(gathered, *found.base)} set to 0. {found.why} "
        f"Residuals have a root mean square of {decimal(found.residual, 4)} nats, with {found.freedom} degrees of "
        "freedom."
    )
    text += (
        " Intervals are percentiles of a bootstrap over seeds; they hold the noise of seeds, not whether the form is "
        "right."
        if has_draws
        else " There is no interval, because no place has two seeds."
    )
    if found.form != "levels" and found.freedom < 3:
        text += " So few degrees of freedom cannot show whether the form is right."
    blocks: list[Block] = [text.replace("  ", " ")]
    rows = [(name, *_parameter(name, estimate)) for name, estimate in found.shape.items()]
    rows += [(f"offset of {arm_title(gathered, *kind)}", *_nats(estimate)) for kind, estimate in found.offsets.items()]
    for arm, estimate in found.between_ranges.items():
        rows.append((f"{arm_title(gathered, arm)}: offset of [-1, 1] - [0, 1]", *_nats(estimate)))
    blocks.append(Table(("parameter", "value", "95% interval"), tuple(rows)))
    return blocks + _prediction(gathered, found)


def _prediction(gathered: Gathered, found: Fit) -> list[Block]:
    if found.form == "levels":
        return [f"This form says nothing of the loss with {TARGET_NAME}."]
    if found.predict is None:
        off = f"This form continues the ladder's own tokens per parameter; {TARGET_NAME} are off that line"
        return [f"{off}, so it says nothing of the loss there."]
    items = []
    for kind in [found.base, *found.offsets]:
        estimate = found.predict(kind, *TARGET)
        name = arm_title(gathered, *kind)
        width = estimate.high - estimate.low
        if not width <= WIDEST or not all(e.determined for e in found.shape.values()):  # NaN too
            items.append(f"{name}: not determined" + (f" (interval wider than {WIDEST:g})." if width > WIDEST else "."))
        else:
            value, low, high = (decimal(x, 3) for x in (estimate.value, estimate.low, estimate.high))
            items.append(f"{name}: {value} [{low}, {high}].")
    return [f"Held-out loss with {TARGET_NAME}, if the form holds so far outside of the ladder:", Bullets(tuple(items))]


def _trends(gathered: Gathered) -> list[Block]:
    """Return, for each arm in both ranges, how their difference changes with size."""
    headline = Quantity(LOSS, MEAN, None)
    by_arm: dict[str, list[tuple[int, list[float]]]] = {}
    for group, seeds in gathered.measured.items():
        other = gathered.partner(group, group.arm, "positive") if group.range == "negative" else None
        if other is not None and (pairs := gathered.differences(group, other, headline)):
            n = next(iter(seeds.values())).non_embedding_parameters
            by_arm.setdefault(group.arm, []).append((n, pairs))
    items = []
    for arm, by_size in by_arm.items():
        if (found := trend(by_size, TARGET[0])) is not None:
            items.append(f"{arm_title(gathered, arm)}: {_trend(found)}")
    if not items:
        return []
    lead = (
        "Whether the difference [-1, 1] - [0, 1] in held-out loss changes with size, by a line through the pairs over "
        "log N, of all lengths of training together, with Student's intervals:"
    )
    return [lead, Bullets(tuple(items))]


def _trend(found: Trend) -> str:
    text = f"{decimal(found.slope, 4, True)} nats per tenfold parameters {interval(found.of_slope, LOSS)}"
    if found.at_target is None:
        return text + "; two sizes do not show a line, so nothing is said of larger models."
    if found.at_target.high - found.at_target.low > WIDEST_DIFFERENCE:
        return text + f"; at 1.3B parameters not determined (interval wider than {WIDEST_DIFFERENCE:g})."
    there = f"{decimal(found.target, 4, True)} {interval(found.at_target, LOSS)}"
    return text + f"; at 1.3B parameters, if the line continues so far, {there}."


def _parameter(name: str, estimate: Estimate) -> tuple[str, str]:
    if not estimate.determined:
        return "not determined", "-"
    if name in ("A", "B"):
        both = "-" if estimate.low != estimate.low else f"[{estimate.low:.3g}, {estimate.high:.3g}]"
        return f"{estimate.value:.3g}", both
    both = "-" if estimate.low != estimate.low else f"[{decimal(estimate.low, 3)}, {decimal(estimate.high, 3)}]"
    return decimal(estimate.value, 3), both


def _nats(estimate: Estimate) -> tuple[str, str]:
    return decimal(estimate.value, 4, True), interval(estimate, LOSS)
