"""The registry of token mixers: the facts that each mixer declares, and the look-up by name.

A mixer is one file `mixer_*.py` with a class that `register` adds under its name in configurations. The
configuration, the model, the FLOPs of MFU, model cards, exports, tests and documentation read these declarations.
This file needs only Python, and is copied unchanged into exported folders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

DECLARED = ("title", "paper", "cost")  # what every mixer has to declare

MIXERS: dict[str, Any] = {}  # classes of mixers by name; `lrnn.model.mixers` fills it
ALIASES: dict[str, str] = {}  # names of mixers by other names that configurations may have

M = TypeVar("M", bound=type)


@dataclass(frozen=True)
class Ranges:
    """Descriptions of the two ranges of eigenvalues of the state transition in a mixer, in a few words each."""

    negative: str  # of [-1, 1], `allow_neg_eigval` true
    positive: str  # of [0, 1]


@dataclass(frozen=True)
class Cost:
    """The cost of a mixer, per token and layer.

    The recurrence of K V numbers per head takes K V multiply-adds for each read (with k, with q) and for each write of
    a product k v^T: DeltaNet reads with k, writes, and reads with q. The elementwise decay of the state does not count.
    """

    weights: int  # of linear maps: a multiply-add each
    recurrence: int  # multiply-adds with the state or with the other tokens
    state: int | None  # numbers that a sequence carries in the state; None if they grow with its length
    channels: int = 0  # of short convolutions: `conv_size` multiply-adds each
    cache_per_token: int = 0  # numbers that each token of a sequence adds to what it carries, in the model's dtype


def canonical_name(name: str) -> str:
    """Return the name under which a mixer is registered, given that name or an alias. Others are returned unchanged."""
    return ALIASES.get(name, name)


def register(name: str, *aliases: str) -> Callable[[M], M]:
    """Return a class decorator that registers a mixer under `name`. Configurations may name it by an alias too.

    Raises:
        TypeError: the class does not declare its title, paper or cost.
        ValueError: another class has the name.
    """

    def add(mixer: M) -> M:
        missing = [fact for fact in DECLARED if getattr(mixer, fact, None) is None]
        if missing:
            raise TypeError(f"mixer {name!r}, class {mixer.__qualname__}, does not declare {', '.join(missing)}")
        known = MIXERS.get(name)
        # A module that is executed again, as transformers does with changed code, replaces its own class.
        if known is not None and (known.__module__, known.__qualname__) != (mixer.__module__, mixer.__qualname__):
            raise ValueError(f"mixer {name!r} is already {known.__qualname__} of {known.__module__}")
        MIXERS[name] = mixer
        ALIASES.update(dict.fromkeys(aliases, name))
        return mixer

    return add
