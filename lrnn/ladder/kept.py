"""Compare what is kept of cells with the settings that they have now."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.ladder.cells import Cell
from lrnn.ladder.measure.settings import MeasureConfig
from lrnn.ladder.results import CellResult, has_result, read_result
from lrnn.pretrain.changes import Changes, flatten, run_defaults

CORPORA, MEASURE = "corpora.", "measure."
SHOWN = 3  # changed cells, and keys of each, in a message


@dataclass
class Kept:
    """The cells of a ladder by what is kept of them.

    Attributes:
        done: cells with a result of the same settings, and the results, in the same order.
        changed: cells with a result of other settings, and the keys that differ, by the cell's name.
    """

    done: list[Cell] = field(default_factory=list)
    results: list[CellResult] = field(default_factory=list)
    changed: dict[str, Changes] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "Kept":
        """Read the results of cells. Raises UserError if one is damaged."""
        kept = cls()
        for cell in cells:
            if not has_result(cell.result_folder):
                continue
            result = read_result(cell.result_folder)
            if changes := result_changes(cell, result):
                kept.changed[cell.name] = changes
            else:
                kept.done.append(cell)
                kept.results.append(result)
        return kept

    def refuse_changed(self) -> None:
        """Raise UserError if cells have results of other settings."""
        if not self.changed:
            return
        listed = [f"{name} has {_listed(changes)}" for name, changes in list(self.changed.items())[:SHOWN]]
        more = f", and {len(self.changed) - SHOWN} more" if len(self.changed) > SHOWN else ""
        raise UserError(
            f"results of other settings: {'; '.join(listed)}{more}; restore the settings, choose another out, or add "
            "--redo to replace these results"
        )


def result_changes(cell: Cell, result: CellResult) -> Changes:
    """Return the settings in which a result differs from its cell: key -> (then, now).

    The content of corpora is compared if they are here.
    """
    digests = {f"{CORPORA}{name}": digest for name, digest in result.corpora.items()}
    return changes(result.settings | digests, settings_with_corpora(cell, if_here=True))


def settings_with_corpora(cell: Cell, if_here: bool = False) -> dict[str, Any]:
    """Return all that decides the result of a cell, the content of the corpora included.

    Args:
        if_here: leave out corpora that are not here.

    Raises:
        UserError: a corpus is not here, or damaged.
    """
    digests = cell.corpora(if_here)
    return cell.settings | {f"{CORPORA}{name}": digest for name, digest in digests.items()}


def changes(then: dict[str, Any], now: dict[str, Any]) -> Changes:
    """Return the settings that differ: key -> (then, now). A key that one of them lacks has its default.

    The content of corpora is compared only if both know it.
    """
    defaults = _defaults()
    found = {}
    for key in sorted(then.keys() | now.keys()):
        if key.startswith(CORPORA) and not (key in then and key in now):
            continue
        old, new = (settings.get(key, defaults.get(key)) for settings in (then, now))
        if old != new:
            found[key] = (old, new)
    return found


def begin_training(cell: Cell, settings: dict[str, Any]) -> bool:
    """Note the settings that a cell is trained with, and return whether its folder holds a training of other ones."""
    file = cell.run_dir / "cell" / "settings.json"
    trained = {key: value for key, value in settings.items() if not key.startswith(MEASURE)}
    differs = file.exists() and bool(changes(json.loads(file.read_text(encoding="utf-8")), trained))
    if not differs:
        write_json(file, trained)
    return differs


def _defaults() -> dict[str, Any]:
    """Return the defaults of settings that are of a newer version than what is kept."""
    model = LrnnConfig().to_dict()
    return {
        **{f"run.{key}": value for key, value in flatten(run_defaults()).items()},
        **{f"model.{key}": value for key, value in model.items()},
        **{f"{MEASURE}{key}": value for key, value in flatten(MeasureConfig().decisive()).items()},
    }


def _listed(changes: Changes) -> str:
    shown = [f"{key} = {old!r} (now {new!r})" for key, (old, new) in list(changes.items())[:SHOWN]]
    return ", ".join([*shown, *(["..."] if len(changes) > SHOWN else [])])
