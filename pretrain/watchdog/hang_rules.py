"""Decide whether a run hangs, and on which rank, from what is known of each rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from lrnn.pretrain.config import WatchdogConfig

# Within these seconds a rank whose connection broke can connect again, or its launcher can end the job by itself.
BROKEN_SECONDS = 5.0
SHOWN = 8  # largest number of ranks that a message describes one by one


class Place(NamedTuple):
    """Where a rank's main thread is. All ranks pass the same places in the same order."""

    phase: str  # what the thread is doing, such as "waiting for data"
    step: int  # the step it works on; 0 before the first
    changes: int  # number of changes of phase so far; the rank with the fewest is the furthest behind
    starting: bool  # true until this process has done a step: loading and compiling take longer

    def __str__(self) -> str:
        return f"{self.phase} (step {self.step})" if self.step else self.phase


@dataclass
class Seen:
    """The facts that the watching rank knows about a rank. Times are seconds on the watching rank's clock."""

    rank: int
    host: str
    process: int
    place: Place
    heard: float  # time of its last sign of life
    moved: float  # time of its last change of place
    broken: float | None = None  # time since which it has not been connected
    left: float | None = None  # time of its goodbye
    error: str = ""  # the error that it left with

    def hear(self, now: float, place: Place | None = None) -> None:
        """Note a sign of life, and the rank's place if it came with one."""
        self.heard, self.broken = now, None
        if place is not None and place != self.place:
            self.place, self.moved = place, now

    def leave(self, now: float, error: str) -> None:
        """Note a goodbye. Nothing more is expected of the rank."""
        self.left, self.error = now, error

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process})"


class Verdict(NamedTuple):
    """A hang in words, and the ranks that it is blamed on."""

    message: str
    ranks: list[int]
    stalled: bool  # whether all ranks are alive; then the stacks of their threads help


def find_lost(now: float, seen: Sequence[Seen], settings: WatchdogConfig) -> Verdict | None:
    """Find the ranks that died, or left the others waiting by an error. Return None if there are none."""
    reasons = {s.rank: reason for s in seen if (reason := _loss(now, s, settings)) is not None}
    if not reasons:
        return None
    lost = [s for s in seen if s.rank in reasons]
    words = [f"{s} {reasons[s.rank]}; it was last {s.place}" for s in lost[:SHOWN]]
    return Verdict("; ".join(words) + _more(lost) + _others(now, seen, lost), [s.rank for s in lost], stalled=False)


def find_stalled(now: float, seen: Sequence[Seen], settings: WatchdogConfig) -> Verdict | None:
    """Find the ranks furthest behind, if no rank has made progress for too long. Return None if one has."""
    present = [s for s in seen if s.left is None]
    limit = settings.startup_seconds if any(s.place.starting for s in present) else settings.stall_seconds
    still = now - max((s.moved for s in present), default=now)
    if still < limit:
        return None
    fewest = min(s.place.changes for s in present)
    last = [s for s in present if s.place.changes == fewest]
    which = "furthest behind" if len(last) < len(present) else "equally far"
    words = [f"{s}: {s.place} for {now - s.moved:.0f} s" for s in last[:SHOWN]]
    message = (
        f"the run is stalled: no rank has made progress for {still:.0f} s; {which}: {'; '.join(words)}{_more(last)}"
    )
    return Verdict(message + _others(now, seen, last), [s.rank for s in last], stalled=True)


def describe_wait(now: float, seen: Sequence[Seen]) -> str:
    """Describe what the first of `seen` is doing and for how long, and which ranks it may be waiting for."""
    own = seen[0]
    text = f"still {own.place}: {now - own.moved:.0f} s"
    behind = [s for s in seen if s.left is None and s.place.changes < own.place.changes]
    return text + (f"; {_groups(now, behind)}" if behind else "")


def _loss(now: float, s: Seen, settings: WatchdogConfig) -> str | None:
    if s.left is not None:
        return f"ended with {s.error}" if s.error and now - s.left >= settings.lost_seconds else None
    if s.broken is not None and now - s.broken >= min(BROKEN_SECONDS, settings.lost_seconds):
        return "is gone: it closed its connection without a goodbye"
    if now - s.heard >= settings.lost_seconds:
        return f"is lost: no sign of life for {now - s.heard:.0f} s"
    return None


def _others(now: float, seen: Iterable[Seen], blamed: Iterable[Seen]) -> str:
    ranks = {s.rank for s in blamed}
    others = [s for s in seen if s.left is None and s.rank not in ranks]
    return f"; the others: {_groups(now, others)}" if others else ""


def _groups(now: float, seen: Iterable[Seen]) -> str:
    """Describe ranks with their places, grouped by place."""

    def place(s: Seen) -> Place:
        return s.place

    ordered = sorted(seen, key=lambda s: (s.place.changes, s.place, s.rank))
    groups = ((place, list(group)) for place, group in groupby(ordered, key=place))
    return ", ".join(
        f"{_numbers([s.rank for s in group])} {place} for {now - max(s.moved for s in group):.0f} s"
        for place, group in groups
    )


def _numbers(ranks: list[int]) -> str:
    """Format ranks as in "rank 3" or "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _more(listed: Sequence[Seen]) -> str:
    return f" and {len(listed) - SHOWN} more ranks" if len(listed) > SHOWN else ""
