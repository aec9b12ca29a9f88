"""Five variables that are swapped, rotated and assigned, by arithmetic modulo 2 (bits) or 5.

    a, b, c, d, e = 3, 1, 0, 4, 1
    b, d = d, b
    c = (c + 2) % 5
    a, b, e = e, a, b
    d = 0
    e = (e + c) % 5
    assert e == 1

One of the five values is followed from the start to the question: other values are added to it, it is added to no
other, and it is never overwritten. So the answer depends on the first values and on changes all along the program,
however long it is, and every answer can be made right by choosing that value.
"""

from dataclasses import dataclass

from lrnn.traces.permutations import NAMES, all_moves, assign
from lrnn.traces.program import Format, Program, Rng

DEGREE = len(NAMES)


@dataclass(frozen=True)
class Lines:
    """Lines of a program, where the value that is followed was and is, and what is added to it in between."""

    texts: list[str]
    first: list[int]  # the first values, with 0 as the one that is followed
    origin: int
    where: int
    added: int
    last: int | None  # the number that was assigned last


class Variables(Format):
    """Assignments to five variables, of which one is asked for.

    Args:
        modulus: number of values that a variable can have.
    """

    unit = "assignments"

    def __init__(self, modulus: int) -> None:
        self.modulus, self.choices = modulus, tuple(map(str, range(modulus)))

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        unchanged, in_place = rng.below(self.modulus) == 0, rng.below(DEGREE) == 0  # as often as by chance
        while True:
            lines = self._lines(rng, length)
            if (lines.added == 0, lines.where == lines.origin) == (unchanged, in_place):
                break
        first = list(lines.first)
        first[lines.origin] = (answer - lines.added) % self.modulus
        return Program(
            start=assign(first),
            changes=tuple(lines.texts),
            question=f"assert {NAMES[lines.where]} ==",
            answer=answer,
            initial=str(first[lines.where]),
            last=str(first[-1] if lines.last is None else lines.last),
        )

    def _lines(self, rng: Rng, length: int) -> Lines:
        origin = where = rng.below(DEGREE)
        first = [rng.below(self.modulus) for _ in range(DEGREE)]
        first[origin] = 0
        values, texts, last = list(first), [], None
        for _ in range(length):
            kind = rng.below(5)
            other = (where + 1 + rng.below(DEGREE - 1)) % DEGREE  # a variable that does not hold the followed value
            if kind < 2:
                move = rng.choice(all_moves(DEGREE, 2 + kind))
                move.apply(values)
                if where in move.sources:
                    where = move.targets[move.sources.index(where)]
                texts.append(move.text)
            elif kind == 2:
                last = values[other] = rng.below(self.modulus)
                texts.append(f"{NAMES[other]} = {last}")
            elif kind == 3:
                target, term = rng.below(DEGREE), 1 + rng.below(self.modulus - 1)
                values[target] = (values[target] + term) % self.modulus
                texts.append(self._sum(NAMES[target], str(term)))
            else:
                target = (other + 1 + rng.below(DEGREE - 1)) % DEGREE
                values[target] = (values[target] + values[other]) % self.modulus
                texts.append(self._sum(NAMES[target], NAMES[other]))
        return Lines(texts, first, origin, where, values[where], last)

    def _sum(self, name: str, term: str) -> str:
        """Return the statement that adds `term` to a variable."""
        return f"{name} = {name} ^ {term}" if self.modulus == 2 else f"{name} = ({name} + {term}) % {self.modulus}"
