"""The pictures of results and differences: loss by size and compute, forest plot, accuracies by length, positions."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

import numpy as np

from lrnn.ladder.measures import ALL as ALL_KINDS
from lrnn.ladder.measures import MEASURES
from lrnn.ladder.report.differences import ALL, BETWEEN_RANGES, Difference, Differences
from lrnn.ladder.report.gathered import MEAN, Gathered, Group, Quantity
from lrnn.ladder.report.protocol import arm_title
from lrnn.ladder.report.scaling import LOSS
from lrnn.ladder.report.style import Kind, Style, add_legend, grid_of_panels
from lrnn.ladder.report.wording import ACCURACY, count

Drawn = tuple[str, str, str, Any]  # file, title, caption and matplotlib's Figure
HEADLINE = Quantity(LOSS, MEAN, None)
CUT_OFF = 0.5  # nats above the lowest loss by position: one arm that fails would flatten the others
BARS = "Bars are one standard error over seeds; a point without a bar is one seed."


def draw_results(gathered: Gathered) -> Iterator[Drawn]:
    """Yield the pictures of the results."""
    style = Style(gathered)
    if HEADLINE in gathered.headlines:
        caption = (
            "Held-out loss by size and by compute, and its difference from "
            f"{arm_title(gathered, *_base(gathered))}. {BARS} Bars of differences are over pairs of seeds."
        )
        yield "loss.png", "Held-out loss by size and compute", caption, _loss(gathered, style)
    for size in dict.fromkeys(group.size for group in gathered.measured):
        for name, title, measures in (
            ("traces", "Program traces", ["traces_accuracy"]),
            ("retrieval", "Recall and needles", ["recall_accuracy", "needle_accuracy"]),
            ("answers", "Right answers of recall and needles", ["recall_bits_per_byte", "needle_bits_per_byte"]),
        ):
            figure = _by_length(gathered, style, size, measures)
            if figure is not None:
                yield f"{name}-{size}.png", f"{title}, {size}", f"{title} by length, {size}. {BARS}", figure
    if figure := _by_position(gathered, style):
        caption = (
            "Loss by position in long documents. The dotted line is the length of training; losses of more than "
            f"{CUT_OFF:g} nats above the lowest are cut off. {BARS}"
        )
        yield "position.png", "Loss by position", caption, figure


def draw_differences(gathered: Gathered, differences: Differences) -> Iterator[Drawn]:
    """Yield the forest plot of the headlines between ranges."""
    found = differences.headlines(BETWEEN_RANGES)
    if found:
        caption = (
            "[-1, 1] - [0, 1] by headline, with 95% intervals over seeds and documents; points of single seeds have "
            "none. Full diamonds are over all sizes of an arm. The grey band is a loss of "
            f"±{gathered.ladder.effect:g} nats; the arrow shows where [-1, 1] is better."
        )
        yield "differences.png", "Differences between ranges", caption, _forest(gathered, found)


def kinds_at(gathered: Gathered, size: str | None = None) -> list[Kind]:
    """Return the arms and ranges that were measured, at a size or at any."""
    return list(dict.fromkeys((g.arm, g.range) for g in gathered.measured if size in (None, g.size)))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error, NaN for a single value: it has no bar."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else np.nan


def _loss(gathered: Gathered, style: Style) -> Any:
    figure, axes = grid_of_panels(3, 3, sharey=False)
    base = _base(gathered)
    kinds = kinds_at(gathered)
    for i, kind in enumerate(kinds):
        groups = [g for g in gathered.measured if (g.arm, g.range) == kind and gathered.values(g, HEADLINE)]
        look = style.of(kind)
        for ratio in dict.fromkeys(_ratio(gathered, g) for g in groups):  # a line per number of tokens per parameter
            members = [g for g in groups if _ratio(gathered, g) == ratio]
            n = np.array([_parameters(gathered, g) for g in members], float)
            tokens = np.array([g.tokens for g in members], float)
            means, errors = np.transpose([mean_and_error(list(gathered.values(g, HEADLINE).values())) for g in members])
            axes[0].errorbar(n, means, errors, capsize=2, **look)
            axes[1].errorbar(6 * n * tokens, means, errors, capsize=2, **look)
            others = [gathered.partner(g, *base) for g in members]
            pairs = [
                (x, gathered.differences(g, other, HEADLINE))
                for x, g, other in zip(n, members, others, strict=True)
                if other is not None
            ]
            pairs = [(x, values) for x, values in pairs if values]
            if pairs and kind != base:
                means, errors = np.transpose([mean_and_error(values) for _, values in pairs])
                # Points side by side, because they would hide each other.
                x = np.array([x for x, _ in pairs]) * 1.02 ** (i - len(kinds) / 2)
                axes[2].errorbar(x, means, errors, capsize=2, **look)
    unit = MEASURES[LOSS].unit
    axes[0].set(title="Held-out loss by size", xlabel="non-embedding parameters", ylabel=unit)
    axes[1].set(title="Held-out loss by compute", xlabel="6 x parameters x tokens (FLOP)", ylabel=unit)
    axes[2].set(title=f"minus {arm_title(gathered, *base)}", xlabel="non-embedding parameters", ylabel=unit)
    axes[2].axhspan(-gathered.ladder.effect, gathered.ladder.effect, color="grey", alpha=0.15, lw=0)
    axes[2].axhline(0, color="grey", lw=0.8)
    # One tick per size: its first arm's, of which those of other arms differ little.
    sizes = {g.size: g for g in reversed(gathered.measured)}.values()
    of_sizes = [_parameters(gathered, g) for g in sizes]
    compute = [6 * n * g.tokens for n, g in zip(of_sizes, sizes, strict=True)]
    for axis, ticks, labels in (
        (axes[0], of_sizes, [count(n) for n in of_sizes]),
        (axes[1], compute, [f"{flop:.1e}".replace("e+", "e") for flop in compute]),
        (axes[2], of_sizes, [count(n) for n in of_sizes]),
    ):
        axis.set_xscale("log")
        axis.set_xticks(ticks, labels, fontsize=8)
        axis.minorticks_off()
    add_legend(figure, axes)
    return figure


def _base(gathered: Gathered) -> Kind:
    """Return the kind that losses are drawn relative to: the reference, else the first arm, in [0, 1] if it has it."""
    reference = gathered.ladder.reference
    return min(kinds_at(gathered), key=lambda kind: (kind[0] != reference, kind[1] != "positive"))


def _parameters(gathered: Gathered, group: Group) -> int:
    return next(iter(gathered.groups[group].values())).non_embedding_parameters


def _ratio(gathered: Gathered, group: Group) -> int:
    """Return tokens per parameter, such that values within some 5% of one another are mostly equal."""
    return round(np.log(group.tokens / _parameters(gathered, group)) / 0.05)


def _forest(gathered: Gathered, found: list[Difference]) -> Any:
    """Draw a panel per headline, a row per place."""
    from matplotlib.figure import Figure

    style = Style(gathered)
    quantities = list(dict.fromkeys(d.quantity for d in found))
    places = list(dict.fromkeys(d.place for d in found))
    singles = {p.arm for p in places if [q.arm for q in places].count(p.arm) == 2}
    # An arm with one place repeats it over all sizes.
    places = [p for p in places if p.arm == ALL or not (p.size == ALL and p.arm in singles)]
    places.sort(key=lambda p: (p.arm == ALL, list(gathered.ladder.arms).index(p.arm) if p.arm != ALL else 0))
    figure = Figure(figsize=(2.2 + 2.2 * len(quantities), 1.6 + 0.32 * len(places)), layout="constrained")
    axes = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axis, quantity in zip(axes, quantities, strict=True):
        measure = MEASURES[quantity.measure]
        for d in (d for d in found if d.quantity == quantity and d.place in places):
            y = places.index(d.place)
            whole = d.place.size == ALL
            color = "black" if d.place.arm == ALL else style.color(d.place.arm)
            ends = None if d.interval is None else [[d.mean - d.interval.low], [d.interval.high - d.mean]]
            look = {"marker": "D" if whole else "o", "mfc": color if whole else "white", "lw": 2 if whole else 1.2}
            axis.errorbar([d.mean], [y], xerr=ends, color=color, ms=5, capsize=2, **look)
        axis.axvline(0, color="grey", lw=0.8)
        if quantity.measure == LOSS:
            axis.axvspan(-gathered.ladder.effect, gathered.ladder.effect, color="grey", alpha=0.15, lw=0)
        arrow = "<- better" if measure.better == "low" else "better ->"
        axis.set_title("\n".join(wrap(measure.title, 26)), fontsize=9)
        axis.set_xlabel(f"{measure.unit}\n{arrow}", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=3)
        axis.grid(alpha=0.3)
    names = ["all arms" if p.arm == ALL else arm_title(gathered, p.arm) for p in places]
    tokens = {p: "" if p.tokens is None or _one_length(places, p.size) else f" {count(p.tokens)}" for p in places}
    labels = [
        f"{name}, {'all sizes' if p.size == ALL else p.size}{tokens[p]}" for name, p in zip(names, places, strict=True)
    ]
    axes[0].set_yticks(range(len(places)), labels, fontsize=8)
    axes[0].set_ylim(len(places) - 0.5, -0.5)
    figure.suptitle("[-1, 1] - [0, 1], 95% intervals", fontsize=10)
    return figure


def _one_length(places: list[Any], size: str) -> bool:
    return len({p.tokens for p in places if p.size == size}) == 1


def _by_length(gathered: Gathered, style: Style, size: str, measures: list[str]) -> Any | None:
    """Draw a panel per kind of question at a size, by length, for its longest training."""
    groups = _longest(gathered, size)
    quantities = [q for q in gathered.quantities if q.measure in measures and q.at is not None and q.of != ALL_KINDS]
    quantities = [q for q in quantities if any(gathered.values(g, q) for g in groups)]
    parts = list(dict.fromkeys((q.measure, q.of) for q in quantities))
    if not parts:
        return None
    unit = MEASURES[measures[0]].unit
    figure, axes = grid_of_panels(len(parts), 4, sharey=unit == ACCURACY)
    for axis, (measure, of) in zip(axes, parts, strict=True):
        ats = sorted({q.at for q in quantities if (q.measure, q.of) == (measure, of) and q.at is not None})
        for group in groups:
            _line(axis, gathered, group, [Quantity(measure, of, at) for at in ats], style)
        title = of if len(measures) == 1 else f"{MEASURES[measure].title}:\n{of}"
        axis.set(xlabel=MEASURES[measure].at)
        if unit == ACCURACY:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(title, fontsize=9)
        _powers_of_two(axis, ats)
    axes[0].set_ylabel(unit)
    add_legend(figure, axes)
    figure.suptitle(
        f"{' and '.join(MEASURES[m].title for m in dict.fromkeys(m for m, _ in parts))}, {size}", fontsize=10
    )
    return figure


def _by_position(gathered: Gathered, style: Style) -> Any | None:
    """Draw a panel per size, for its longest training."""
    quantities = [q for q in gathered.quantities if q.measure == "position_nats" and q.of != ALL_KINDS]
    sizes = dict.fromkeys(g.size for g in gathered.measured)
    parts = [
        (size, of)
        for size in sizes
        for of in dict.fromkeys(q.of for q in quantities)
        if any(gathered.values(g, q) for g in _longest(gathered, size) for q in quantities if q.of == of)
    ]
    if not parts:
        return None
    figure, axes = grid_of_panels(len(parts), 4, sharey=False)
    for axis, (size, of) in zip(axes, parts, strict=True):
        ats = sorted({q.at for q in quantities if q.of == of and q.at is not None})
        for group in _longest(gathered, size):
            _line(axis, gathered, group, [Quantity("position_nats", of, at) for at in ats], style)
            trained = next(iter(gathered.groups[group].values())).settings.get("run.data.seq_len")
        if trained is not None:
            axis.axvline(trained, color="grey", ls=":", lw=1)
        means = [y for line in axis.containers for y in line[0].get_ydata()]
        margin = 0.05 * min(CUT_OFF, max(means) - min(means)) or 0.01
        axis.set_ylim(min(means) - margin, min(max(means), min(means) + CUT_OFF) + margin)
        axis.set(title=f"{size}, {of}", xlabel="last position (tokens)", ylabel=MEASURES["position_nats"].unit)
        _powers_of_two(axis, ats)
    add_legend(figure, axes)
    return figure


def _longest(gathered: Gathered, size: str) -> list[Group]:
    """Return the groups at a size, of each kind the one with the most tokens."""
    best: dict[Kind, Group] = {}
    for group in (g for g in gathered.measured if g.size == size):
        kind = (group.arm, group.range)
        if kind not in best or group.tokens > best[kind].tokens:
            best[kind] = group
    return list(best.values())


def _line(axis: Any, gathered: Gathered, group: Group, quantities: list[Quantity], style: Style) -> None:
    """Draw mean and standard error of a group by `at`."""
    found = [(q.at, list(gathered.values(group, q).values())) for q in quantities]
    found = [(at, values) for at, values in found if values]
    if found:
        means, errors = np.transpose([mean_and_error(values) for _, values in found])
        axis.errorbar([at for at, _ in found], means, errors, capsize=2, **style.of((group.arm, group.range)))


def _powers_of_two(axis: Any, ats: list[float]) -> None:
    axis.set_xscale("log", base=2)
    shown = ats if len(ats) <= 5 else ats[::2]
    axis.set_xticks(shown, [f"{at:g}" for at in shown], fontsize=8)
