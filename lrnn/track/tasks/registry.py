"""The state-tracking tasks by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from lrnn.errors import UserError
from lrnn.track.tasks.base import Task
from lrnn.track.tasks.bracket_arithmetic import BracketArithmetic
from lrnn.track.tasks.formal_languages import CycleNavigation, EvenPairs, ModularArithmetic, Parity
from lrnn.track.tasks.group_words import GroupWord

TASKS: dict[str, Callable[..., Task]] = {
    "parity": Parity,
    "even_pairs": EvenPairs,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "modular_arithmetic_brackets": BracketArithmetic,
    "group_word": GroupWord,
}


def make_task(name: str, **parameters: Any) -> Task:
    """The task of that name; an unknown name or parameter is a UserError that names the nearest and lists all."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}.{_nearest(name, list(TASKS))} The tasks are: {', '.join(TASKS)}")
    known = list(inspect.signature(TASKS[name]).parameters)
    for parameter in parameters:
        if parameter not in known:
            listed = ", ".join(known) or "none"
            hint = _nearest(parameter, known)
            raise UserError(f"task {name!r} has no parameter {parameter!r}.{hint} Its parameters are: {listed}")
    return TASKS[name](**parameters)


def _nearest(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
