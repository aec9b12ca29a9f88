"""Print a configuration as lrnn reads it, with where each value was written, or its JSON schema for editors.

What is printed is the whole: base files, changes on the command line and defaults. It is a configuration itself. A run,
a grid or a ladder that would be refused is refused here too, with the same message.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lrnn import config_schema, shipped
from lrnn.config_schema import GRID, LADDER, MODEL, RUN, SECTIONS
from lrnn.errors import UserError
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.config import LadderConfig
from lrnn.model_config import described_fields, every_field, load_model_config
from lrnn.parsing import Key
from lrnn.pretrain import old_config
from lrnn.pretrain.changes import flatten
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.settings import BASE, parse_json_file, resolve
from lrnn.track.grid import GridConfig, load_grid

DEFAULT = "default"
TITLES = {
    RUN: "a run of lrnn pretrain",
    GRID: "a grid of lrnn track",
    LADDER: "a ladder of lrnn ladder",
    MODEL: "a model",
}
COMMENT_COLUMN = 50  # of the comments, unless a line is longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `lrnn config`."""
    parser.add_argument(
        "config", nargs="?", help="YAML file of a run, a grid or a ladder, JSON file of a model, or a name"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument(
        "--schema", choices=config_schema.KINDS, help="print the JSON schema of such files instead, for an editor"
    )
    parser.epilog = (
        "examples:\n"
        "  lrnn config configs/340m.yaml optim.lr=2e-4 model.hidden_size=512\n"
        "  lrnn config --schema run > run.schema.json\n"
        "and in the YAML file, for the YAML plugin of most editors:\n"
        "  # yaml-language-server: $schema=run.schema.json"
    )


def main(args: argparse.Namespace) -> int:
    if args.schema is not None:
        print(json.dumps(config_schema.json_schema(args.schema), indent=2, ensure_ascii=False))
        return 0
    if args.config is None:
        raise UserError("give the configuration to print, or --schema with one of " + ", ".join(config_schema.KINDS))
    kind = kind_of(args.config)
    values, origins = {RUN: _run, GRID: _grid, LADDER: _ladder, MODEL: _model}[kind](args.config, args.overrides)
    print(f"# {args.config}: {TITLES[kind]}")
    print("\n".join(annotate(values, origins)))
    return 0


def kind_of(given: str) -> str:
    """Return whether a file, or a configuration that comes with lrnn, describes a run, a grid, a ladder or a model."""
    path = Path(given)
    if not path.is_file():
        in_folder = {RUN: shipped.RUNS, GRID: shipped.GRIDS, LADDER: shipped.LADDERS, MODEL: shipped.MODELS}
        return next((kind for kind, folder in in_folder.items() if given in shipped.names(folder)), RUN)
    if path.suffix == ".json":
        return MODEL
    keys = resolve(Config, path).values.keys()
    return max(SECTIONS, key=lambda kind: len(keys & SECTIONS[kind].model_fields.keys()))  # the first of equal ones


def annotate(values: dict[str, Any], origins: dict[Key, str]) -> list[str]:
    """Return the lines of a mapping in YAML, each value with a comment that says where it comes from.

    Args:
        origins: where values were written; the others are defaults.
    """
    lines = list(_lines(values, (), origins))
    column = max([COMMENT_COLUMN, *(len(text) for text, origin in lines if origin and len(text) < 2 * COMMENT_COLUMN)])
    return [f"{text:{column}}  # {origin}" if origin else text for text, origin in lines]


def _lines(values: dict[str, Any], path: Key, origins: dict[Key, str]) -> Iterator[tuple[str, str]]:
    """Yield (line, comment) for each key of a mapping and of the mappings and lists of mappings in it."""
    for name, value in values.items():
        key = (*path, name)
        if isinstance(value, dict) and value:
            yield f"{_flow(name)}:", ""
            yield from (("  " + text, origin) for text, origin in _lines(value, key, origins))
        elif isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            yield f"{_flow(name)}:", ""
            for number, item in enumerate(value):
                for line, (text, origin) in enumerate(_lines(item, (*key, number), origins)):
                    yield ("  - " if line == 0 else "    ") + text, origin
        else:
            yield f"{_flow(name)}: {_flow(value)}", origins.get(key, DEFAULT)


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _run(given: str, overrides: list[str]) -> tuple[dict[str, Any], dict[Key, str]]:
    """Return the whole of a run, its model included, and where it was written."""
    settings = resolve(Config, given, overrides)
    origins = dict(settings.origins)
    config = load_config(given, overrides)
    converted = flatten(old_config.convert(settings.values, given))
    origins |= {key: "converted" for name in converted if (key := (*name.split("."),)) not in origins}
    values, model = config.model_dump(), load_model_of(config)
    base = config.model.get(BASE) if isinstance(config.model, dict) else config.model
    if base is None and config.init_from is not None:
        origins = {("model", field.name): f"init_from {config.init_from}" for field in described_fields()} | origins
    elif base is not None:
        lines = parse_json_file(base, "model configuration").lines
        own = {("model", *key): f"{base}:{line}" for key, line in lines.items()}
        origins = own | {key: origin for key, origin in origins.items() if key[0] != "model" or len(key) > 1}
    origins["model", "max_position_embeddings"] = "longest of the stages" if config.stages else "data.seq_len"
    values["model"] = _fields(every_field(model), {key[1] for key in origins if key[0] == "model" and len(key) > 1})
    return values, origins


def _grid(given: str, overrides: list[str]) -> tuple[dict[str, Any], dict[Key, str]]:
    grid, _ = load_grid(given, overrides)
    return grid.model_dump(), resolve(GridConfig, given, overrides).origins


def _ladder(given: str, overrides: list[str]) -> tuple[dict[str, Any], dict[Key, str]]:
    ladder, _ = load_ladder(given, overrides)
    return ladder.model_dump(), resolve(LadderConfig, given, overrides).origins


def _model(given: str, overrides: list[str]) -> tuple[dict[str, Any], dict[Key, str]]:
    path = shipped.find(given, shipped.MODELS, "model configuration")
    if overrides:
        raise UserError(
            f"override {overrides[0]}: {given} is a model; give the run that uses it, and model.{overrides[0]}"
        )
    lines = parse_json_file(path, "model configuration").lines
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    return _fields(every_field(load_model_config(path)), {key[0] for key in origins}), origins


def _fields(model: dict[str, Any], written: set[str | int]) -> dict[str, Any]:
    """Return the fields of a model that lrnn knows, and those that were written."""
    known = [field.name for field in described_fields()]
    names = [*known, *(name for name in model if name in written and name not in known)]
    return {"model_type": model["model_type"]} | {name: model[name] for name in names}
