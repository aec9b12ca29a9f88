"""The runs of a ladder: made of its YAML file, and checked before the first of them starts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.ladder.config import LadderConfig, LadderGrid
from lrnn.pretrain.changes import changes_results, flatten
from lrnn.pretrain.config import Config, load_model_of, model_fields, parse_config
from lrnn.pretrain.corpus.reader import read_manifest
from lrnn.settings import load
from lrnn.track.grid import NO_RANGE, changed_fields, has_range

# Keys of a run that follow from other keys of the ladder, and what to change instead.
OF_THE_LADDER = {
    "run_dir": "out",
    "model": "model of sizes and arms",
    "steps": "tokens of sizes and grids",
    "seed": "seeds of grids",
    "optim.lr": "lr of sizes and grids",
    "schedule.warmup_steps": "warmup",
    "schedule.decay_steps": "decay",
}
NOT_IN_LADDERS = {
    "stages": "a run of a ladder has one stage",
    "init_from": "runs of a ladder begin with random weights",
    "data.stream": "runs of a ladder read corpora",
}
RANGE_FIELD = "allow_neg_eigval"
SUFFIXES = ((10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True)
class Cell:
    """A run of a ladder.

    Attributes:
        name: such as 15m/gated_deltanet/negative/308M/seed-0; also the path of its folders.
        size, arm: their names in the YAML file.
        range: "negative", "positive", or "none" for arms without one.
        seed: of weights and data.
        budget: tokens that were asked for.
        lr: peak learning rate.
        config: the run, as `lrnn pretrain` takes it. `config.run_dir` is OUT/runs/NAME.
        model: the model of the run.
        gpus, at_once: GPUs that it is spread over, and runs that share one; see `SizeConfig`.
        settings: all that decides the result, by dotted key, but for the content of the corpora.
        result_folder: OUT/results/NAME.
    """

    name: str
    size: str
    arm: str
    range: str
    seed: int
    budget: int
    lr: float
    config: Config
    model: LrnnConfig
    gpus: int
    at_once: int
    settings: dict[str, Any]
    result_folder: Path

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def tokens_per_step(self) -> int:
        return self.config.global_batch_size * self.config.data.seq_len

    @property
    def tokens(self) -> int:
        """Tokens that it trains on: the budget, rounded up to whole steps."""
        return self.steps * self.tokens_per_step

    def corpora(self, if_here: bool = False) -> dict[str, str]:
        """Return a digest of the content of each corpus.

        Args:
            if_here: leave out corpora that are not there.

        Raises:
            UserError: a corpus is not there, or damaged.
        """
        sources = [source for source in self.config.data.corpora if not if_here or Path(source.path).exists()]
        return {Path(source.path).name: _digest(source.path) for source in sources}

    def __str__(self) -> str:
        return self.name


def load_ladder(path: str | Path, overrides: Sequence[str] = ()) -> tuple[LadderConfig, list[Cell]]:
    """Read a ladder, and make all its cells, in the order in which they run.

    Raises:
        UserError: the file is wrong (see `lrnn.settings.load`), or a run or a model that follows from it would be.
    """
    ladder = load(LadderConfig, path, overrides)
    origin = str(path)
    _check_run_keys(ladder, origin)
    cells: dict[str, Cell] = {}
    for i, grid in enumerate(ladder.grids):
        for cell in _cells(ladder, grid, f"{origin}: grids[{i}]"):
            cells.setdefault(cell.name, cell)
    return ladder, list(cells.values())


def _check_run_keys(ladder: LadderConfig, origin: str) -> None:
    """Raise UserError for a key of a run that the ladder sets, or that has no place in one."""
    given = {"run": ladder.run}
    given |= {f"sizes.{name}.run": size.run for name, size in ladder.sizes.items()}
    given |= {f"arms.{name}.run": arm.run for name, arm in ladder.arms.items()}
    for where, run in given.items():
        for key in run.keys() | flatten(run).keys():
            if key in OF_THE_LADDER:
                raise UserError(f"{origin}: {where}.{key} follows from {OF_THE_LADDER[key]} of the ladder; remove it")
            for name, reason in NOT_IN_LADDERS.items():
                if key == name or key.startswith(f"{name}."):
                    raise UserError(f"{origin}: {where}.{name} cannot be given: {reason}")


def _cells(ladder: LadderConfig, grid: LadderGrid, origin: str) -> Iterator[Cell]:
    for seed in grid.seeds:
        for size_name in grid.sizes:
            size = ladder.sizes[size_name]
            rates = [size.lr] if grid.lr is None else grid.lr if isinstance(grid.lr, list) else [grid.lr]
            for arm_name in grid.arms:
                arm = ladder.arms[arm_name]
                fields, _ = model_fields(size.model | arm.model | arm.sizes.get(size_name, {}))
                if RANGE_FIELD in fields:
                    raise UserError(f"{origin}: {RANGE_FIELD} of {arm_name} at {size_name} is set by ranges; remove it")
                for range_ in grid.ranges if has_range(fields, f"{origin}: arms.{arm_name}.model") else [NO_RANGE]:
                    for budget in grid.tokens or size.tokens:
                        for lr in rates:
                            yield _cell(ladder, (size_name, arm_name, range_, seed, budget, lr), fields, origin)


def _cell(
    ladder: LadderConfig, place: tuple[str, str, str, int, int, float], fields: dict[str, Any], origin: str
) -> Cell:
    """Return a cell. Raise UserError, which begins with `origin`, if its run would be refused.

    Args:
        place: size, arm, range, seed, budget and learning rate.
        fields: of the model, but for the range.
    """
    size_name, arm_name, range_, seed, budget, lr = place
    size, arm = ladder.sizes[size_name], ladder.arms[arm_name]
    rate = [] if lr == size.lr else [f"lr-{lr!r}"]
    name = "/".join([size_name, arm_name, range_, _short(budget), *rate, f"seed-{seed}"])
    origin = f"{origin}: {name}"
    raw = _merged(_merged(ladder.run, size.run), arm.run)
    if range_ != NO_RANGE:
        fields = fields | {RANGE_FIELD: range_ == "negative"}
    raw |= {"run_dir": str(Path(ladder.out) / "runs" / name), "model": fields, "seed": seed}
    raw["optim"] = _section(raw, "optim", origin) | {"lr": lr}
    # The batch is known once the keys have been checked, and the steps follow from it.
    batch = parse_config(raw | {"steps": 1}, origin)
    steps = -(-budget // (batch.global_batch_size * batch.data.seq_len))
    schedule = {"warmup_steps": round(ladder.warmup * steps)}
    if batch.schedule.name == "wsd":
        schedule["decay_steps"] = min(round(ladder.decay * steps), steps - schedule["warmup_steps"])
    raw["schedule"] = _section(raw, "schedule", origin) | schedule
    config = parse_config(raw | {"steps": steps}, origin)
    model = _model(config, origin)
    names = [Path(source.path).name for source in config.data.corpora]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{origin}: run.data.corpora: two folders are called {twice}; results name corpora by folder")
    return Cell(
        name, size_name, arm_name, range_, seed, budget, lr, config, model, size.gpus, size.at_once,
        _settings(ladder, config, model), Path(ladder.out) / "results" / name,
    )  # fmt: skip


def _section(raw: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    section = raw.get(key, {})
    if not isinstance(section, dict):
        raise UserError(f"{origin}: run.{key} = {section!r} should be a mapping of keys to values")
    return section


def _model(config: Config, origin: str) -> LrnnConfig:
    try:
        return load_model_of(config)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two mappings of which the second changes the first key by key; lists and single values are replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _short(tokens: int) -> str:
    """Return a number of tokens exactly, such as 308M, 1232M or 8192."""
    for unit, suffix in SUFFIXES:
        if tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def _settings(ladder: LadderConfig, config: Config, model: LrnnConfig) -> dict[str, Any]:
    """Return all that decides a result but the content of the corpora, by dotted key, as JSON has it.

    Fields of the model are those that differ from their defaults, so that a field added later changes nothing.
    """
    run = {key: value for key, value in flatten(config.model_dump()).items() if changes_results(key)}
    data = config.data.model_dump(exclude={"corpora", "stream"})
    weights = {Path(source.path).name: source.weight for source in config.data.corpora}
    return {
        **{f"run.{key}": value for key, value in run.items()},
        "run.seed": config.seed,
        **{f"run.data.{key}": value for key, value in data.items()},
        **{f"run.data.corpora.{name}.weight": weight for name, weight in weights.items()},
        **{f"model.{key}": value for key, value in changed_fields(model).items()},
        **{f"measure.{key}": value for key, value in flatten(ladder.measure.decisive()).items()},
    }


@cache
def _digest(path: str) -> str:
    """Return a SHA-256 of the checksums of a corpus's shards: the same for the same tokens, wherever they are."""
    splits = read_manifest(path)["splits"]
    sums = [f"{split}:{shard['sha256']}" for split in sorted(splits) for shard in splits[split]["shards"]]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
