"""The report's sections, as text and tables: findings, results, differences, learning rates, the fit, training."""

from collections.abc import Sequence

import numpy as np

from lrnn.ladder.cells import Cell
from lrnn.ladder.measures import ALL as MEAN_OF_KINDS
from lrnn.ladder.measures import MEASURES, MIX
from lrnn.ladder.report.differences import ALL, BETWEEN_RANGES, Difference, Differences
from lrnn.ladder.report.document import Block, Bullets, Heading, Section, Table
from lrnn.ladder.report.gathered import MEAN, Gathered, Group, Quantity
from lrnn.ladder.report.intervals import holm
from lrnn.ladder.report.protocol import arm_title, protocol, warnings
from lrnn.ladder.report.scaling import scaling
from lrnn.ladder.report.wording import count, interval, number, probability, several, verdict
from lrnn.track.grid import RANGE_NAMES

IN_TABLES = (
    "heldout_bits_per_byte", "gold_bits_per_byte", "traces_accuracy", "recall_accuracy", "recall_bits_per_byte",
    "needle_accuracy", "needle_bits_per_byte", "position_nats",
)  # fmt: skip
RESULTS, RANGES, TRAINING = "Results", "Differences between ranges", "Training"  # sections with pictures
FIRST = "[-1, 1]"  # what verdicts between ranges are about


def make_sections(gathered: Gathered, differences: Differences, cells: Sequence[Cell]) -> list[Section]:
    """Return all sections of the report, without pictures."""
    question = gathered.ladder.question
    if not gathered.groups:
        none = Section("Results", [f"None of the {len(cells)} cells has a result yet."])
        return [Section("Question", [question]), none] if question else [none]
    first = findings(differences, gathered)
    if question:
        first.blocks.insert(0, f"Question: {question}")
    found = [
        first,
        warnings(gathered, differences, cells),
        protocol(gathered, cells),
        results(gathered),
        between_ranges(gathered, differences),
        between_arms(gathered, differences),
        learning_rates(gathered),
        scaling(gathered),
        training(gathered),
        results_by_kind(gathered),
        by_size(gathered, differences),
        everything(gathered, differences),
    ]
    return [section for section in found if section is not None]


def findings(differences: Differences, gathered: Gathered) -> Section:
    """Return what the headlines show of the ranges: a sentence for each arm and headline, in a fixed order."""
    items = []
    for d in differences.family():
        where = f"{arm_title(gathered, d.place.arm)}, {_title(d.quantity)}"
        said = verdict(d, gathered.ladder.effect, FIRST)
        error = interval(d.interval, d.quantity.measure)
        if d.interval is None and d.stderr_documents is not None:
            error = f"± {number(d.stderr_documents, d.quantity.measure)} over documents"
        mean = number(d.mean, d.quantity.measure, signed=True)
        items.append(f"{where}: {said} ({mean} {error}, {several(d.seeds, 'pair')}).")
    if not items:
        return Section("Findings", ["No arm has results in both ranges with the same size, tokens and seed."])
    lead = "[-1, 1] - [0, 1] over all sizes of an arm, with 95% intervals over seeds and documents:"
    return Section("Findings", [lead, Bullets(tuple(items))])


def results(gathered: Gathered) -> Section:
    """Return a table per measure: mean and standard error over seeds by size, arm and range."""
    text = (
        "Mean ± standard error over seeds. With one seed, the standard error is that over documents, marked d; it "
        "says nothing of how another seed would fare. The HTML page has the means over kinds kind by kind."
    )
    return Section(RESULTS, [text, *_tables(gathered, by_kind=False)])


def results_by_kind(gathered: Gathered) -> Section | None:
    """Return the tables that `results` gives as means over kinds, such as formats of traces, for every kind."""
    blocks = _tables(gathered, by_kind=True)
    return Section("Results by kind", blocks, in_markdown=False) if blocks else None


def _tables(gathered: Gathered, by_kind: bool) -> list[Block]:
    """Return a heading and a table per measure: all, or those by kind of measures with several kinds and places."""
    blocks: list[Block] = []
    for measure in IN_TABLES:
        quantities = [q for q in gathered.quantities if q.measure == measure]
        kinds = dict.fromkeys(q.of for q in quantities if q.of not in (MIX, MEAN_OF_KINDS))
        ats = sorted({q.at for q in quantities if q.at is not None})
        has_both = len(kinds) > 1 and bool(ats)
        if not quantities or (by_kind and not has_both):
            continue
        known = MEASURES[measure]
        better = "" if known.better is None else f"; {'lower' if known.better == 'low' else 'higher'} is better"
        unit = ", ".join(part for part in (known.unit, f"by {known.at}" if known.at else "") if part)
        means = has_both and not by_kind
        over = f", mean over {several(len(kinds), known.of)}" if means else ""
        blocks.append(Heading(f"{_capital(known.title)}{over} ({unit}{better})"))
        blocks.append(_table(gathered, [Quantity(measure, MEAN, at) for at in ats] if means else quantities))
    return blocks


def between_ranges(gathered: Gathered, differences: Differences) -> Section | None:
    """Return the differences of the headlines between ranges, by size and over sizes."""
    found = differences.headlines(BETWEEN_RANGES)
    if not found:
        return None
    family = differences.family()
    raw = [None if d.interval is None else d.interval.p for d in family]
    adjusted = dict(zip(map(id, family), holm(raw), strict=True))
    judged = [(d, probability(p), probability(adjusted[id(d)])) for d, p in zip(family, raw, strict=True)]
    scatters = []
    for d in {d.quantity: d for d in found}.values():
        if d.pooled is not None:
            deviation = number(d.pooled.deviation, d.quantity.measure)
            scatters.append(f"{_title(d.quantity)} {deviation} ({several(d.pooled.df, 'degree')} of freedom)")
    ways = (
        "A difference is the mean over pairs of the same size, tokens and seed. 'Seeds, own' is the standard error by "
        "the scatter of the place alone, with Student's interval; 'seeds, pooled' takes the scatter of all places "
        "together, as if it were the same at all sizes and arms; 'documents' is the standard error over documents, "
        "paired. The last interval adds both errors, pooled seeds and documents, and the verdict goes by it; without "
        "two seeds anywhere there is none. Means over sizes are about these sizes, not about others."
    )
    headlines = several(len({d.quantity for d in family}), "headline")
    number_of = (
        f"The table holds {several(len(family), 'comparison')} that were fixed before the runs, and Holm's adjustment "
        f"counts them: each arm over all its sizes in {headlines}, which are means over everything that a measure was "
        f"taken of and at. {len(differences.all)} differences were computed in all; they are in differences.csv, and "
        "those outside of this table are to look at, not to judge by. The HTML page has the headlines by size."
    )
    rows = tuple((*_start(gathered, d), _said(d, gathered.ladder.effect, FIRST), p, p_holm) for d, p, p_holm in judged)
    blocks: list[Block] = [number_of, Table(("arm", *START, "[-1, 1] is", "p", "p, Holm"), rows), ways]
    if scatters:
        blocks.append(f"Pooled scatter of single pairs: {'; '.join(scatters)}.")
    of_loss = [d for d in found if d.quantity == _loss(gathered)]
    if of_loss:
        title = f"{_capital(_title(of_loss[0].quantity))} by size and tokens"
        blocks += [Heading(title), _by_place(gathered, of_loss, "[-1, 1] is", FIRST)]
    return Section(RANGES, blocks)


def between_arms(gathered: Gathered, differences: Differences) -> Section | None:
    """Return the differences of the headlines between each arm and the reference in the same range."""
    reference = gathered.ladder.reference
    found = [d for d in differences.headlines() if d.place.contrast != BETWEEN_RANGES]
    if reference is None or not found:
        return None
    title = arm_title(gathered, reference)
    text = (
        f"Arm - {title} of the same range; an arm without a range is compared with each range of the other. p values "
        "are not adjusted: no comparison here belongs to the family above."
    )
    over_sizes = [d for d in found if d.place.size == ALL]
    return Section("Differences between arms", [text, _by_place(gathered, over_sizes, "the arm is", "arm")])


def by_size(gathered: Gathered, differences: Differences) -> Section | None:
    """Return the differences of all headlines by size and tokens; the Markdown leaves most to differences.csv."""
    ranges = differences.headlines(BETWEEN_RANGES)
    arms = [d for d in differences.headlines() if d.place.contrast != BETWEEN_RANGES]
    blocks: list[Block] = []
    if ranges:
        blocks += [Heading("Between ranges"), _by_place(gathered, ranges, "[-1, 1] is", FIRST)]
    if arms:
        blocks += [Heading("Between arms"), _by_place(gathered, arms, "the arm is", "arm")]
    return Section("Differences by size and tokens", blocks, in_markdown=False) if blocks else None


def learning_rates(gathered: Gathered) -> Section | None:
    """Return the loss by learning rate, for the arms and ranges that were swept."""
    headline = _loss(gathered)
    swept: dict[tuple[str, str, str, int], list[Group]] = {}
    for group in gathered.groups:
        swept.setdefault((group.size, group.arm, group.range, group.tokens), []).append(group)
    rows = []
    best_of: dict[tuple[str, str, str, int], Group] = {}
    for (size, arm, range_, tokens), groups in swept.items():
        if len(groups) < 2 or headline is None:
            continue
        by_rate = {group.lr: gathered.values(group, headline) for group in groups}
        shared = sorted(set.intersection(*(set(values) for values in by_rate.values())))
        if not shared:
            continue
        means = {lr: float(np.mean([values[seed] for seed in shared])) for lr, values in by_rate.items()}
        best = min(means, key=lambda lr: means[lr])
        best_of[size, arm, range_, tokens] = next(group for group in groups if group.lr == best)
        own = gathered.ladder.sizes[size].lr
        for lr, mean in means.items():
            marks = [word for word, is_so in (("best", lr == best), ("used", lr == own)) if is_so]
            place = (arm_title(gathered, arm, range_), size, count(tokens))
            seeds = ", ".join(map(str, shared))
            rows.append((*place, f"{lr:g}", number(mean, headline.measure), ", ".join(marks), seeds))
    if not rows or headline is None:
        return None
    text = (
        f"{_capital(_title(headline))} by peak learning rate, over the seeds that all rates have. All other sections "
        "are about the rate that is marked as used. Where the ranges differ in the best rate, part of their difference "
        "is the rate's."
    )
    columns = ("arm", "size", "tokens", "learning rate", MEASURES[headline.measure].unit, "", "seeds")
    items = []
    for (size, arm, range_, tokens), group in best_of.items():
        other = best_of.get((size, arm, "positive", tokens)) if range_ == "negative" else None
        if other is not None and (pairs := gathered.differences(group, other, headline)):
            difference = number(float(np.mean(pairs)), headline.measure, signed=True)
            where = f"{arm_title(gathered, arm)}, {size}, {count(tokens)} tokens, each range at its own best rate"
            said = f"[-1, 1] - [0, 1] {difference} nats per token, by {several(len(pairs), 'pair')}"
            items.append(f"{where}: {said}. The rates were chosen by the same losses, so this is no test.")
    return Section("Learning rates", [text, Table(columns, tuple(rows)), *([Bullets(tuple(items))] if items else [])])


def training(gathered: Gathered) -> Section:
    """Return stability and speed of the training by group."""
    rows = []
    for group, seeds in gathered.measured.items():
        facts = [result.training for result in seeds.values()]
        rows.append(
            (
                arm_title(gathered, group.arm, group.range),
                group.size,
                count(group.tokens),
                str(len(facts)),
                _mean([f.get("tokens_per_second") for f in facts], ",.0f"),
                _mean([_hours(f.get("gpu_seconds")) for f in facts], ".3f"),
                _mean([f.get("peak_gb") for f in facts], ".1f"),
                _sum([f.get("spikes") for f in facts]),
                _sum([f.get("skipped_steps") for f in facts]),
            )
        )
    columns = ("arm", "size", "tokens", "runs", "tokens/s", "GPU-hours per run", "peak GB", "spikes", "skipped steps")
    text = "Means over the runs; spikes and skipped steps are sums. Runs that share a GPU slow each other."
    return Section(TRAINING, [text, Table(columns, tuple(rows))])


def everything(gathered: Gathered, differences: Differences) -> Section | None:
    """Return all differences over all sizes of an arm; the Markdown leaves them to differences.csv."""
    rows = [d for d in differences.all if d.place.size == ALL and d.quantity.of != MEAN]
    if not rows:
        return None
    lines = tuple(
        (
            d.place.contrast if d.place.contrast == BETWEEN_RANGES else "arm - reference",
            *_start(gathered, d),
            _said(d, gathered.ladder.effect, FIRST if d.place.contrast == BETWEEN_RANGES else "arm"),
        )
        for d in rows
    )
    text = "All measures over all sizes of an arm. With so many, some differ by chance."
    return Section("All differences", [text, Table(("contrast", "arm", *START, "verdict"), lines)], in_markdown=False)


START = ("measure", "difference", "pairs", "95% interval")


def _start(gathered: Gathered, d: Difference) -> tuple[str, ...]:
    arm = "all arms" if d.place.arm == ALL else arm_title(gathered, d.place.arm, d.place.range)
    if d.place.range != d.place.against:
        arm += f" against {RANGE_NAMES[d.place.against]}"
    measure = d.quantity.measure
    return arm, _title(d.quantity), number(d.mean, measure, True), str(d.seeds), interval(d.interval, measure)


def _said(d: Difference, effect: float, first: str) -> str:
    return verdict(d, effect, first).removeprefix(f"{first} ")


def _by_place(gathered: Gathered, found: list[Difference], what: str, first: str) -> Table:
    rows = []
    keys = [(d.quantity, d.place.contrast, d.place.arm, d.place.range, d.place.against) for d in found]
    for d, key in zip(found, keys, strict=True):
        if d.place.size == ALL and keys.count(key) == 2:
            continue  # it would repeat the only size
        measure = d.quantity.measure
        arm, title, mean, pairs, both = _start(gathered, d)
        sizes = "all" if d.place.size == ALL else d.place.size
        tokens = "several" if d.place.tokens is None else count(d.place.tokens)
        own = "-" if d.stderr_own is None else f"{number(d.stderr_own, measure)} {interval(d.own_interval, measure)}"
        pooled = "-" if d.stderr_pooled is None else number(d.stderr_pooled, measure)
        documents = "-" if d.stderr_documents is None else number(d.stderr_documents, measure)
        said = _said(d, gathered.ladder.effect, first)
        rows.append((title, arm, sizes, tokens, mean, pairs, own, pooled, documents, both, said))
    columns = (
        "measure", "arm", "size", "tokens", "difference", "pairs", "seeds, own", "seeds, pooled", "documents",
        "95% interval", what,
    )  # fmt: skip
    return Table(columns, tuple(rows))


def _table(gathered: Gathered, quantities: list[Quantity]) -> Table:
    """Return a row per size, arm and range, and per `of` if there are several values of `at`."""
    ats = sorted({q.at for q in quantities if q.at is not None})
    kinds = list(dict.fromkeys(q.of for q in quantities))
    kinds.sort(key=lambda of: of in (MIX, MEAN_OF_KINDS))  # means come last
    rows = []
    for group, seeds in gathered.measured.items():
        start = (group.size, count(group.tokens), arm_title(gathered, group.arm, group.range), str(len(seeds)))
        measure = quantities[0].measure
        if ats:
            for of in kinds:
                cells = [_mean_and_error(gathered, group, Quantity(measure, of, at)) for at in ats]
                if any(cell != "-" for cell in cells):
                    rows.append((*start, of, *cells))
        else:
            rows.append((*start, *(_mean_and_error(gathered, group, Quantity(measure, of, None)) for of in kinds)))
    columns = ("size", "tokens", "arm", "seeds")
    if ats:
        return Table((*columns, MEASURES[quantities[0].measure].of, *(f"{at:g}" for at in ats)), tuple(rows))
    return Table((*columns, *kinds), tuple(rows))


def _mean_and_error(gathered: Gathered, group: Group, quantity: Quantity) -> str:
    values = list(gathered.values(group, quantity).values())
    if not values:
        return "-"
    mean = number(float(np.mean(values)), quantity.measure)
    fewer = "" if len(values) == len(gathered.groups[group]) else f" (n {len(values)})"
    if len(values) > 1:
        return f"{mean} ± {number(float(np.std(values, ddof=1)) / len(values) ** 0.5, quantity.measure)}{fewer}"
    one = next(r for r in gathered.groups[group].values() if gathered.value(r, quantity) is not None)
    stderr = gathered.stderr(one, quantity)
    return mean + ("" if stderr is None else f" ± {number(stderr, quantity.measure)} d") + fewer


def _loss(gathered: Gathered) -> Quantity | None:
    return next((q for q in gathered.headlines if q.measure == "heldout_nats_per_token"), None)


def _title(quantity: Quantity) -> str:
    title = MEASURES[quantity.measure].title
    if quantity.of == MEAN:
        return title
    at = "" if quantity.at is None else f" at {quantity.at:g}"
    return f"{title}, {quantity.of}{at}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(float(np.mean(known)), form) if known else "-"


def _sum(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):g}" if known else "-"
