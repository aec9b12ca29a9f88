"""Variables with different values that tuple assignments permute: word problems over S3 and S5.

a, b, c, d, e = 3, 0, 4, 1, 2
a, b, c, d, e = c, a, e, b, d
a, b, c, d, e = b, a, d, e, c
assert d == 3
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

from lrnn.traces.program import Format, Program, Rng

NAMES = "abcde"


@dataclass(frozen=True)
class Move:
    """The assignment `targets = sources`, by numbers of variables, and as text."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    text: str

    def apply(self, values: list[int]) -> None:
        moved = [values[source] for source in self.sources]
        for target, value in zip(self.targets, moved, strict=True):
            values[target] = value


@cache
def all_moves(degree: int, size: int) -> tuple[Move, ...]:
    """Return the moves of `size` of the first `degree` variables that change something."""
    return tuple(
        Move(targets, sources, " = ".join(", ".join(NAMES[v] for v in side) for side in (targets, sources)))
        for targets in combinations(range(degree), size)
        for sources in permutations(targets)
        if sources != targets
    )


def draw_moves(rng: Rng, degree: int, size: int, length: int) -> tuple[list[Move], list[int]]:
    """Return moves, and for every variable the number of the one that held its value at first."""
    moves = [rng.choice(all_moves(degree, size)) for _ in range(length)]
    origins = list(range(degree))
    for move in moves:
        move.apply(origins)
    return moves, origins


@dataclass(frozen=True)
class Word:
    """Moves of variables that hold 0, 1, ... in the order of `values` at first, and the variable to ask for."""

    values: list[int]
    moves: list[Move]
    asked: int


def draw_word(rng: Rng, degree: int, length: int, answer: int) -> Word:
    """Return moves of all variables after which the one to ask for holds `answer`.

    In one of `degree` words, it is what the variable held at first: as often as by chance, however few moves there are.
    """
    unmoved = rng.below(degree) == 0
    while True:
        moves, origins = draw_moves(rng, degree, degree, length)
        asked = [v for v in range(degree) if (origins[v] == v) == unmoved]
        if asked:
            break
    variable = rng.choice(asked)
    values = rng.shuffled([value for value in range(degree) if value != answer])
    values.insert(origins[variable], answer)
    return Word(values, moves, variable)


def assign(values: list[int]) -> str:
    """Return the statement that gives the variables their first values."""
    return f"{', '.join(NAMES[: len(values)])} = {', '.join(map(str, values))}"


class Permutations(Format):
    """Three or five variables, all of which every line permutes."""

    unit = "assignments"

    def __init__(self, degree: int) -> None:
        self.degree, self.choices = degree, tuple(map(str, range(degree)))

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        word = draw_word(rng, self.degree, length, answer)
        return Program(
            start=assign(word.values),
            changes=tuple(move.text for move in word.moves),
            question=f"assert {NAMES[word.asked]} ==",
            answer=answer,
            initial=str(word.values[word.asked]),
            last=str(word.values[-1]),
        )
