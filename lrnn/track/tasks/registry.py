"""Find a state-tracking task by name."""

import inspect
from collections.abc import Callable
from typing import Any

from lrnn.errors import UserError
from lrnn.settings import name_hint
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
    """Return the task of that name.

    Raises:
        UserError: the task or a parameter is unknown; the message names the nearest and lists all.
    """
    if not isinstance(name, str) or name not in TASKS:  # it may be anything that YAML can hold
        raise UserError(f"unknown task {name!r}; {name_hint(str(name), list(TASKS), list_all=True)}")
    known = list(inspect.signature(TASKS[name]).parameters)
    for parameter in parameters:
        if parameter not in known:
            hint = name_hint(parameter, known, list_all=True)
            raise UserError(f"task {name!r} has no parameter {parameter!r}; {hint}")
    return TASKS[name](**parameters)
