"""Write the configuration reference, `docs/configuration.md`, from the schemas themselves.

    python docs/make_configuration.py           # writes the page
    python docs/make_configuration.py --check   # fails if the page is not what would be written

Every key is listed with its type, default, unit, bounds and meaning. For YAML files these come from the fields of the
schema and the strings below them, for a model's JSON from the signature and the docstring of `LrnnConfig`.
"""

import argparse
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from lrnn.ladder.config import LadderConfig
from lrnn.model.mixers import MIXERS
from lrnn.model.registry import ALIASES
from lrnn.model_config import described_fields
from lrnn.pretrain.config import Config
from lrnn.settings import Section, Unit
from lrnn.track.grid import GridConfig

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

<!-- Written by docs/make_configuration.py from the schemas. Change the fields there, not this page. -->

Any key of a YAML file can be set on the command line too, as `key.sub=value`, where the value is YAML: `optim.lr=2e-4`.
Unknown keys, wrong types and keys that are given twice are refused with the key's full path and its line.

`base: other.yaml` in a file makes it a change of another one, or of several (`base: [a.yaml, b.yaml]`, of which later
ones count more): mappings are merged key by key, lists and single values are replaced. `lrnn config CONFIG` prints the
whole that results, with where each value was written; it takes `key.sub=value` too. `lrnn config --schema run` prints a
JSON schema: if it is saved as `run.schema.json`, a YAML file that begins with the line
`# yaml-language-server: $schema=run.schema.json` gets completion and descriptions in editors.

A relative path in a file starts at the folder of the file, one on the command line at the current folder. `~` and
`$VARIABLES` are replaced in both. Files that come with lrnn, such as `340m`, count as files in the current folder, or
in the folder of the file whose `base` they are. In lrnn 0.1.0, all paths started at the current folder: this still
holds, with a notice, for a file whose paths exist there and none of them beside the file.
"""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping", Any: "any value"}
SIGNS = {annotated_types.Gt: ("gt", "> "), annotated_types.Ge: ("ge", ">= ")}
SIGNS |= {annotated_types.Lt: ("lt", "< "), annotated_types.Le: ("le", "<= ")}


def page() -> str:
    """Return the text of the page."""
    parts = [
        HEAD,
        "## A pretraining run\n\nThe YAML file of `lrnn pretrain` and `lrnn submit`.\n",
        *tables(Config),
        "## A model\n\nThe JSON file that a run's `model` names, in the form of a Hugging Face `config.json`. "
        "A run sets `max_position_embeddings` from its `data.seq_len`.\n",
        table(model_rows()),
        "### Mixers\n\nThe values of `mixer`, and what the two ranges of eigenvalues mean in each.\n",
        mixer_table(),
        "## A grid of state-tracking trainings\n\nThe YAML file of `lrnn track`.\n",
        *tables(GridConfig),
        "## A ladder of pretraining runs\n\nThe YAML file of `lrnn ladder`.\n",
        *tables(LadderConfig),
    ]
    return "\n".join(parts)


def tables(schema: type[Section], path: str = "") -> Iterator[str]:
    """Yield the table of a section, then those of the sections in it, each below a heading."""
    if path:
        yield f"### {path}\n\n{inspect.cleandoc(schema.__doc__ or '')}\n"
    yield table([row(name, field) for name, field in schema.model_fields.items()])
    for name, field in schema.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            many = {list: "[]", dict: ".NAME"}.get(get_origin(field.annotation), "")
            yield from tables(inner, f"{path}.{name}{many}".removeprefix("."))


def row(name: str, field: FieldInfo) -> list[str]:
    """Return the cells of one field: key, type, default, unit, bounds, meaning."""
    optional = [fact for a in get_args(field.annotation) for fact in getattr(a, "__metadata__", ())]
    units = [fact.name for fact in [*field.metadata, *optional] if isinstance(fact, Unit)]
    bounds = ", ".join(bound for fact in field.metadata if (bound := bound_of(fact)))
    bounds = re.sub(r"at least (\d+) entries, at most \1 entries", r"\1 entries", bounds)
    default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
    if section_of(field.annotation) is not None and not field.is_required() and default != "`null`":
        default = "`[]`" if get_origin(field.annotation) is list else "see below"
    meaning = " ".join((field.description or "").split())
    return [f"`{name}`", type_name(field.annotation), default, ", ".join(units), bounds, meaning]


def model_rows() -> list[list[str]]:
    """Return the rows of a model's JSON."""
    return [
        [f"`{field.name}`", type_name(field.annotation), shown(field.default), "", "", field.meaning]
        for field in described_fields()
    ]


def mixer_table() -> str:
    """Return the table of the registered mixers: what each declares of itself."""
    lines = ["| mixer | what it is | kind | paper | [-1, 1] | [0, 1] |", "|---|---|---|---|---|---|"]
    for name, mixer in MIXERS.items():
        ranges = ("-", "-") if mixer.ranges is None else (mixer.ranges.negative, mixer.ranges.positive)
        names = " or ".join(f"`{x}`" for x in (name, *(alias for alias, of in ALIASES.items() if of == name)))
        cells = [names, mixer.title, mixer.kind.replace("rnn", "RNN"), f"arXiv:{mixer.paper}", *ranges]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; columns that are empty throughout are left out."""
    columns = [["key", "type", "default", "unit", "bounds", "meaning"], *rows]
    kept = [i for i in range(6) if any(cells[i] for cells in rows)]
    lines = ["| " + " | ".join(cells[i].replace("|", "\\|") for i in kept) + " |" for cells in columns]
    return "\n".join([lines[0], "|" + "---|" * len(kept), *lines[1:]]) + "\n"


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section that a type is, holds in a list, or is if it is not None."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def type_name(annotation: Any) -> str:
    """Return a type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return "list of sections" if section_of(annotation) else f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping of sections" if section_of(annotation) else "mapping"
    if hasattr(annotation, "__metadata__"):  # Annotated
        bounds = [
            bound
            for fact in annotation.__metadata__
            for m in getattr(fact, "metadata", [fact])
            if (bound := bound_of(m))
        ]
        return type_name(arguments[0]) + (f" ({', '.join(bounds)})" if bounds else "")
    if section_of(annotation) is not None:
        return "section"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bound_of(fact: Any) -> str:
    """Return what a piece of a field's metadata demands of the value, or an empty text."""
    if type(fact) in SIGNS:
        attribute, sign = SIGNS[type(fact)]
        return f"{sign}{getattr(fact, attribute)}"
    if isinstance(fact, annotated_types.MinLen):
        return f"at least {fact.min_length} entries" if fact.min_length > 1 else "not empty"
    if isinstance(fact, annotated_types.MaxLen):
        return f"at most {fact.max_length} entries"
    return ""


def shown(value: Any) -> str:
    """Return a default as YAML writes it."""
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{value}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not write; fail if the page is out of date")
    if parser.parse_args().check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        return 0 if current else print(f"{PAGE} is out of date: run python {Path(__file__).name}") or 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
