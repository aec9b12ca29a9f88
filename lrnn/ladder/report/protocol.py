"""What was run: sizes, arms, cells, cost, software and text; and warnings about what does not fit together."""

from collections import Counter
from collections.abc import Sequence

from lrnn.ladder.cells import Cell
from lrnn.ladder.report.differences import Differences
from lrnn.ladder.report.document import Bullets, Section, Table
from lrnn.ladder.report.gathered import Gathered, Group
from lrnn.ladder.report.wording import count
from lrnn.ladder.results import CellResult
from lrnn.track.grid import NO_RANGE, RANGE_NAMES

SHOWN_DIGITS = 12  # of a digest
UNEQUAL = 1.02  # largest ratio of the parameters of arms that are compared at a size


def warnings(gathered: Gathered, differences: Differences, cells: Sequence[Cell]) -> Section | None:
    """Return what a reader must know before comparing cells, None if nothing."""
    found = []
    results = gathered.results
    for name in sorted({name for result in results for name in result.corpora}):
        digests = Counter(result.corpora.get(name, "no such corpus") for result in results)
        if len(digests) > 1:
            found.append(f"Corpora differ: cells were trained on different text called {name}: {_counts(digests)}.")
    if missing := missing_cells(gathered, cells):
        found.append(f"{len(missing)} of {len(cells)} cells have no result: {', '.join(missing)}.")
    for measure, names in gathered.incomplete.items():
        found.append(
            f"Parts of {measure} are lacking, so that these cells are left out of its mean: {', '.join(names)}."
        )
    found += differences.mismatched
    for size in dict.fromkeys(group.size for group in gathered.groups):
        counts = [result.non_embedding_parameters for result in results if result.size == size]
        if max(counts) > UNEQUAL * min(counts):
            least, most = count(min(counts)), count(max(counts))
            found.append(f"Models of {size} differ in size: they have {least} to {most} non-embedding parameters.")
    sources = Counter(result.environment.get("source", "unknown") for result in results)
    if len(sources) > 1:
        found.append(f"Cells were computed with different versions of the code: {_counts(sources)}.")
    devices = Counter(result.environment.get("device", "unknown") for result in results)
    if len(devices) > 1:
        found.append(f"Cells were computed on different devices: {_counts(devices)}.")
    return Section("Warnings", [Bullets(tuple(found))]) if found else None


def protocol(gathered: Gathered, cells: Sequence[Cell]) -> Section:
    """Return what was run and measured."""
    ladder, results = gathered.ladder, gathered.results
    done = len(cells) - len(missing_cells(gathered, cells))
    training, measuring = (
        sum(result.training.get(name) or 0.0 for result in results) / 3600
        for name in ("gpu_seconds", "measuring_gpu_seconds")
    )
    unit = "hours of CPUs" if all(result.environment.get("device") == "cpu" for result in results) else "GPU-hours"
    facts = [
        f"{done} of {len(cells)} cells have results. Training took {training:.2f} {unit}, and measuring "
        f"{measuring:.2f}.",
        f"The learning rate rises over the first {ladder.warmup:.0%} of the steps"
        + (f" and falls over the last {ladder.decay:.0%}." if _schedule(results) == "wsd" else "."),
        "Runs of a seed share the order of the data; the two ranges of an arm share the initial weights too.",
        *_environment(results),
        *_corpora(results),
    ]
    return Section("Protocol", [_sizes(gathered), _arms(gathered), Bullets(tuple(facts))])


def missing_cells(gathered: Gathered, cells: Sequence[Cell]) -> list[str]:
    """Return the names of the cells without a result."""
    known = {result.name for result in gathered.results}
    return [cell.name for cell in cells if cell.name not in known]


def arm_title(gathered: Gathered, arm: str, range_: str = NO_RANGE) -> str:
    """Return what an arm is called, with its range if it has one."""
    title = gathered.ladder.arms[arm].title or arm
    return title if range_ in ("", NO_RANGE) else f"{title} {RANGE_NAMES[range_]}"


def _sizes(gathered: Gathered) -> Table:
    """Return a row per size and number of tokens."""
    rows: dict[tuple[str, int], list[tuple[Group, list[CellResult]]]] = {}
    for group, seeds in gathered.groups.items():
        rows.setdefault((group.size, group.tokens), []).append((group, list(seeds.values())))
    lines = []
    for (size, tokens), groups in rows.items():
        members = [result for _, of_group in groups for result in of_group]
        one = members[0]
        parameters = sorted({r.non_embedding_parameters for r in members})
        lines.append(
            (
                size,
                _range([count(n) for n in parameters]),
                _range([count(n) for n in sorted({r.parameters for r in members})]),
                count(tokens),
                _range([f"{tokens / n:.3g}" for n in reversed(parameters)]),
                f"{gathered.ladder.sizes[size].lr:g}",
                f"{one.tokens_per_step:,}",
                f"{one.steps:,}",
                ", ".join(str(seed) for seed in sorted({r.seed for r in members})),
            )
        )
    columns = (
        "size", "non-embedding parameters", "all parameters", "tokens", "tokens per parameter", "learning rate",
        "tokens per step", "steps", "seeds",
    )  # fmt: skip
    return Table(columns, tuple(lines))


def _arms(gathered: Gathered) -> Table:
    """Return a row per arm with its non-embedding parameters by size."""
    sizes = list(dict.fromkeys(group.size for group in gathered.groups))
    arms = dict.fromkeys(group.arm for group in gathered.groups)
    rows = []
    for arm in arms:
        by_size = {}
        for group, seeds in gathered.groups.items():
            if group.arm == arm:
                by_size[group.size] = count(next(iter(seeds.values())).non_embedding_parameters)
        ranges = dict.fromkeys(RANGE_NAMES[group.range] for group in gathered.groups if group.arm == arm)
        title = arm_title(gathered, arm) + (" (reference)" if arm == gathered.ladder.reference else "")
        rows.append((title, ", ".join(ranges), *(by_size.get(size, "-") for size in sizes)))
    return Table(("arm", "eigenvalues", *(f"non-embedding parameters, {size}" for size in sizes)), tuple(rows))


def _environment(results: list[CellResult]) -> list[str]:
    """Return a sentence with the devices and versions, and how many cells had which where they differ."""
    names = dict.fromkeys(name for result in results for name in result.environment)
    parts = []
    for name in names:
        values = Counter(result.environment.get(name, "unknown") for result in results)
        parts.append(f"{name} {next(iter(values))}" if len(values) == 1 else f"{name} {_counts(values)}")
    return [f"Computed with {'; '.join(parts)}."] if parts else []


def _corpora(results: list[CellResult]) -> list[str]:
    names = dict.fromkeys(name for result in results for name in result.corpora)
    parts = []
    for name in names:
        digests = dict.fromkeys(result.corpora[name] for result in results if name in result.corpora)
        parts.append(f"{name} (SHA-256 {', '.join(digest[:SHOWN_DIGITS] for digest in digests)})")
    return [f"Text: {', '.join(parts)}."] if parts else []


def _schedule(results: list[CellResult]) -> str | None:
    return next((str(result.settings.get("run.schedule.name")) for result in results), None)


def _counts(values: Counter[str]) -> str:
    return ", ".join(f"{value[:40]} ({n} cells)" for value, n in values.items())


def _range(values: list[str]) -> str:
    """Return one value, or the first and the last of several."""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
