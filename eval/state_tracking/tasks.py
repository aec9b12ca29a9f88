"""The state-tracking tasks as text that a language model can continue.

A task draws samples as ids, and writes a sample as a question that ends where the answer begins. The question is
stated in words or in Python, which pretrained models have read, and a few solved examples in front of it repeat it.

The permutation tasks ask where one ball is, not for the whole arrangement: S5 has 120 arrangements, far too many
answers to choose from, and an arrangement as text can be half right. This does not make the task easier: the ball is
named only after the last move, so the model must have followed all balls.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lrnn.track.tasks.base import Task
from lrnn.track.tasks.bracket_arithmetic import BracketArithmetic
from lrnn.track.tasks.counter_rng import Field, integers, sample_keys
from lrnn.track.tasks.formal_languages import CycleNavigation, EvenPairs, ModularArithmetic, Parity
from lrnn.track.tasks.group_words import GroupWord

MODULUS = 5
DIGITS = tuple(map(str, range(MODULUS)))
CUPS = ("A", "B", "C", "D", "E")
COLOURS = ("red", "green", "blue", "white", "black")
OPERATORS = ("+", "-", "*")


class TextTask(ABC):
    """Questions with one right answer out of `choices`.

    Attributes:
        unit: what a length counts.
        choices: the possible answers. An answer follows the question after one space.
    """

    unit: str
    choices: tuple[str, ...]

    @abstractmethod
    def draw(self, seed: int, indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Draw the samples `indices` (`[B]` int64) of a seed (see `counter_rng.split_seed`), all of one length.

        Returns:
            What `question` needs, `[B, N]` int64, and the numbers of the right choices, `[B]` int64.
        """

    @abstractmethod
    def question(self, ids: Sequence[int]) -> str:
        """Return the question of one sample, from its row of ids."""


class Word(TextTask):
    """A formal language: every id of the content is a word, and `template` asks a question about the words.

    Args:
        generator: draws the samples.
        unit: what a length counts.
        words: `words[i]` is the word of id i.
        template: the question, with `{}` for the words.
        choices: the possible answers.
        size: the generator's size for a length.
        content: the number of ids, for a length, before the answer and what the generator puts around it.
        join: joins the words of a sample.
    """

    def __init__(
        self,
        generator: Task,
        unit: str,
        words: Sequence[str],
        template: str,
        choices: Sequence[str],
        *,
        size: Callable[[int], int] = lambda length: length + 1,
        content: Callable[[int], int] = lambda length: length,
        join: Callable[[list[str]], str] = " ".join,
    ) -> None:
        self.generator, self.unit, self.words, self.template = generator, unit, tuple(words), template
        self.choices = tuple(choices)
        self.size, self.content, self.join = size, content, join

    def draw(self, seed: int, indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
        size = self.size(length)
        batch = self.generator.batch(seed, indices, size, size)
        answers = batch.labels.max(1).values - self.generator.first_answer_id  # other labels are negative
        return batch.input_ids[:, : self.content(length)], answers

    def question(self, ids: Sequence[int]) -> str:
        return self.template.format(self.join([self.words[i] for i in ids]))


def join_expression(tokens: list[str]) -> str:
    """Return an arithmetic expression as people write it: spaces around an operator between two operands."""
    parts = []
    for before, token in zip(["(", *tokens], tokens, strict=False):
        between = token in OPERATORS and (before == ")" or before.isdigit())
        parts.append(f" {token} " if between else token)
    return "".join(parts)


class Cups(TextTask):
    """Balls under cups that are moved: word problems over S3 or S5, with `variant` as in `GroupWord`.

    A permutation p moves the ball of cup i to cup p[i]. The last id of a sample is the ball that the question is about.
    """

    def __init__(self, degree: int, variant: str) -> None:
        self.generator = GroupWord(f"S{degree}", variant)
        self.permutations: list[list[int]] = self.generator.group.elements.tolist()
        self.choices, self.colours = CUPS[:degree], COLOURS[:degree]
        self.swaps = variant == "only_swaps"
        self.unit = "swaps" if self.swaps else "moves"

    def draw(self, seed: int, indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
        batch = self.generator.batch(seed, indices, length, length)
        balls = integers(sample_keys(seed, indices), Field.QUESTION, 0, len(self.choices))
        cups = self.generator.group.elements[batch.labels[:, -1], balls]
        return torch.cat([batch.input_ids, balls[:, None]], dim=1), cups

    def question(self, ids: Sequence[int]) -> str:
        *elements, ball = ids
        cups, balls = " ".join(self.choices), " ".join(self.colours)
        moves = " ".join(self._move(self.permutations[element]) for element in elements)
        return f"Cups {cups} hold balls {balls}. {moves}\nThe {self.colours[ball]} ball is in cup"

    def _move(self, images: list[int]) -> str:
        if not self.swaps:
            return f"Move {' '.join(self.choices)} to {' '.join(self.choices[image] for image in images)}."
        moved = [self.choices[i] for i, image in enumerate(images) if image != i]
        return f"Swap {' and '.join(moved)}." if moved else "Swap nothing."


class Program(TextTask):
    """A Python variable that every line multiplies by one of 1..4 and adds to, modulo 5.

    No line forgets the previous value, because 5 is prime and no factor is 0.
    """

    unit, choices = "lines", DIGITS
    start = 1

    def draw(self, seed: int, indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
        keys, lines = sample_keys(seed, indices)[:, None], torch.arange(length)
        factors = integers(keys, Field.OPERATOR, lines, MODULUS - 1) + 1
        terms = integers(keys, Field.SYMBOL, lines, MODULUS)
        value = torch.full_like(indices, self.start)
        for line in range(length):
            value = (value * factors[:, line] + terms[:, line]) % MODULUS
        return factors * MODULUS + terms, value

    def question(self, ids: Sequence[int]) -> str:
        lines = [f"x = (x * {number // MODULUS} + {number % MODULUS}) % {MODULUS}" for number in ids]
        return "\n".join([f"x = {self.start}", *lines, "assert x =="])


EVEN_OR_ODD = ("even", "odd")

TEXT_TASKS: dict[str, TextTask] = {
    "parity": Word(Parity(), "bits", ("", "0", "1"), "Bits: {}\nThe number of ones is", EVEN_OR_ODD),
    "even_pairs": Word(
        EvenPairs(),
        "letters",
        ("", "a", "b"),
        "Letters: {}\nThe number of changes from one letter to the next is",
        EVEN_OR_ODD,
    ),
    "cycle_navigation": Word(
        CycleNavigation(MODULUS),
        "moves",
        ("", "stay", "forward", "back"),
        f"A ring of rooms {' '.join(DIGITS)}, from room 0: {{}}\nNow in room",
        DIGITS,
    ),
    "modular_arithmetic": Word(
        ModularArithmetic(MODULUS),
        "numbers",
        ("", *OPERATORS, "=", *DIGITS),
        f"assert ({{}}) % {MODULUS} ==",
        DIGITS,
        size=lambda length: 2 * length + 1,
        content=lambda length: 2 * length - 1,
        join=join_expression,
    ),
    "modular_arithmetic_brackets": Word(
        BracketArithmetic(MODULUS),
        "symbols",
        (*DIGITS, *OPERATORS, "(", ")", "="),
        f"assert {{}} % {MODULUS} ==",  # an expression of three or more symbols has brackets of its own
        DIGITS,
        size=lambda length: length + 3,
        join=join_expression,
    ),
    "s3": Cups(3, "all"),
    "s3_swaps": Cups(3, "only_swaps"),
    "s5": Cups(5, "all"),
    "s5_swaps": Cups(5, "only_swaps"),
    "program": Program(),
}
