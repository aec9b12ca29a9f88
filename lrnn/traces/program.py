"""A program with a question at its end, the half of all programs that it belongs to, and reproducible random draws."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

TRAINING, EVALUATION = 0, 1  # the halves
SHORTEST = 4  # state changes; the first ones of a program decide its half


class Rng:
    """Random draws as a function of a key, the same on every machine and in every version of Python.

    Only `random.Random.random` is used: Python guarantees its numbers, but not those of `choice` or `shuffle`.
    """

    def __init__(self, key: str) -> None:
        self._uniform = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")).random

    def below(self, bound: int) -> int:
        """Return an integer in 0..bound-1."""
        return int(self._uniform() * bound)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result


@dataclass(frozen=True)
class Program:
    """A program that ends in a question.

    Attributes:
        start: the lines that set up the state.
        changes: one text per state change. The change is its first line; others may print values.
        question: the last line, up to where the answer begins.
        answer: the number of the right choice.
        initial: the answer if there were no changes.
        last: the value of an answer's kind that was written last before the question; None if none is written.
    """

    start: str
    changes: tuple[str, ...]
    question: str
    answer: int
    initial: str
    last: str | None

    @property
    def text(self) -> str:
        return "\n".join([self.start, *self.changes, self.question])

    @property
    def half(self) -> int:
        """Return which half the program belongs to, TRAINING or EVALUATION.

        A hash of the start and of the first `SHORTEST` changes decides. Programs that begin alike are in the same half,
        so a program of one half is not the beginning of a longer one of the other half. Values that a change prints do
        not count, because they follow from the rest.
        """
        head = "\n".join([self.start, *(change.split("\n")[0] for change in self.changes[:SHORTEST])])
        return hashlib.sha256(head.encode()).digest()[0] & 1


class Format(ABC):
    """A kind of program.

    Attributes:
        unit: what a length counts.
        choices: the possible answers.
        delimiter: what is between question and answer.
    """

    unit: str
    choices: tuple[str, ...]
    delimiter = " "

    @abstractmethod
    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        """Return a program with `length` state changes (at least `SHORTEST`) of which `choices[answer]` is right."""

    def draw_of_half(self, rng: Rng, length: int, answer: int, half: int) -> Program:
        """Return the first program of that half among those drawn."""
        while True:
            program = self.draw(rng, length, answer)
            if program.half == half:
                return program

    def solved(self, program: Program) -> str:
        """Return the text of the program with its answer."""
        return program.text + self.delimiter + self.choices[program.answer]
