"""Formal languages without brackets (arXiv 2411.12537 section 5.1): parity, even pairs, cycle navigation, arithmetic.

Layouts and ids are those of the paper's released generators. A sequence of size n holds n - 1 tokens of content and
the answer. The answer is the label of the last content position, and its own input slot is padding.
"""

import torch
from torch import Tensor

from lrnn.track.tasks.base import (
    IGNORE,
    Task,
    check_bool,
    check_integer,
    mean_over_sizes,
    one_answer,
    size_range,
)
from lrnn.track.tasks.counter_rng import Field, integers

MAX_MODULUS = 1000  # keeps vocabularies and exact distributions small


def _positions(width: int, like: Tensor) -> Tensor:
    return torch.arange(width, device=like.device)


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Return `values[b, positions[b]]`: `[B]` from `[B, L]` and `[B]`."""
    return values.gather(1, positions[:, None])[:, 0]


class Parity(Task):
    """`size - 1` bits, ids 1 and 2, PAD 0; the answer is (number of 2s mod 2) + 1."""

    vocab_size, num_classes, first_answer_id, pad_id = 3, 2, 1, 0
    answer_table = torch.tensor([[0, 1, 2], [1, 1, 2], [2, 2, 1]])

    def sizes(self, min_length: int, max_length: int) -> list[int]:
        return size_range("parity", min_length, max_length, smallest=2)

    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        bits = integers(keys[:, None], Field.SYMBOL, _positions(width, keys), 2)
        answer = _at(bits.cumsum(1) % 2, lengths - 2)
        return one_answer(bits + 1, lengths - 1, answer + 1, self.pad_id)

    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        self.sizes(min_length, max_length)
        return torch.full((2,), 0.5, dtype=torch.float64)


class EvenPairs(Task):
    """`size - 1` symbols a and b, ids 1 and 2, PAD 0; the answer is 1 if the count of ab and ba is even, else 2.

    The count is even if and only if the first and the last symbol are equal (Deletang et al., arXiv 2207.02098).
    """

    vocab_size, num_classes, first_answer_id, pad_id = 3, 2, 1, 0

    def sizes(self, min_length: int, max_length: int) -> list[int]:
        return size_range("even_pairs", min_length, max_length, smallest=2)

    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        bits = integers(keys[:, None], Field.SYMBOL, _positions(width, keys), 2)
        answer = bits[:, 0] ^ _at(bits, lengths - 2)
        return one_answer(bits + 1, lengths - 1, answer + 1, self.pad_id)

    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        sizes = self.sizes(min_length, max_length)
        equal = (1 + sizes.count(2) / len(sizes)) / 2  # a single symbol equals itself
        return torch.tensor([equal, 1 - equal], dtype=torch.float64)


class CycleNavigation(Task):
    """`size - 1` moves on a cycle from position 0; the answer is the last position (arXiv 2207.02098).

    PAD 0, the moves 0, +1 and -1 are ids 1-3, and positions are ids from 4 on (4-8 on a cycle of 5).
    """

    first_answer_id, pad_id = 4, 0

    def __init__(self, cycle_length: int = 5) -> None:
        self.num_classes = check_integer("cycle_navigation", "cycle_length", cycle_length, 2, MAX_MODULUS)
        self.vocab_size = self.first_answer_id + cycle_length

    def sizes(self, min_length: int, max_length: int) -> list[int]:
        return size_range("cycle_navigation", min_length, max_length, smallest=2)

    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        moves = integers(keys[:, None], Field.SYMBOL, _positions(width, keys), 3)  # 2 means -1
        steps = torch.where(moves == 2, -1, moves)
        answer = _at(steps.cumsum(1) % self.num_classes, lengths - 2)
        return one_answer(moves + 1, lengths - 1, answer + self.first_answer_id, self.pad_id)

    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        at = torch.zeros(self.num_classes, dtype=torch.float64)
        at[0] = 1
        by_size = {}
        for size in range(2, max_length + 1):
            at = (at + at.roll(1) + at.roll(-1)) / 3
            by_size[size] = at
        return mean_over_sizes(by_size, self.sizes(min_length, max_length))


class ModularArithmetic(Task):
    """`digit op digit ... =`: `size - 1` tokens of content, size odd; the answer is the value modulo `modulus`.

    PAD 0, `+ - * =` are ids 1-4, digits are ids from 5 on (5-9 modulo 5). `*` binds tighter than `+` and `-`,
    otherwise evaluation is from left to right. A range means the odd sizes in it. With `running_values` (not in the
    paper) every `+` and `-` is labelled as a `=` in its place would be.
    """

    first_answer_id, pad_id = 5, 0
    minus, times, equals = 2, 3, 4

    def __init__(self, modulus: int = 5, running_values: bool = False) -> None:
        self.num_classes = check_integer("modular_arithmetic", "modulus", modulus, 2, MAX_MODULUS)
        self.answers_along_the_way = check_bool("modular_arithmetic", "running_values", running_values)
        self.vocab_size = self.first_answer_id + modulus
        values = (torch.arange(self.vocab_size) - self.first_answer_id).clamp(min=0)  # of the answers, by id
        self.answer_table = (
            values[:, None] + values
        ) % modulus + self.first_answer_id  # in joined expressions `=` acts as `+`

    def sizes(self, min_length: int, max_length: int) -> list[int]:
        return size_range("modular_arithmetic", min_length, max_length, smallest=3, step=2, first=1)

    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        places = _positions((width + 1) // 2, keys)
        digits = integers(keys[:, None], Field.SYMBOL, places, self.num_classes)
        operators = integers(keys[:, None], Field.OPERATOR, places, 3) + 1
        content = torch.stack([digits + self.first_answer_id, operators], dim=2).flatten(1)[:, :width]
        last = (lengths - 3) // 2  # the number of the last digit
        content = content.scatter(1, (lengths - 2)[:, None], self.equals)
        answers = self._running_values(digits, operators) + self.first_answer_id
        input_ids, labels = one_answer(content, lengths - 1, _at(answers, last), self.pad_id)
        if self.answers_along_the_way:
            closes = (operators != self.times) & (places < last[:, None])
            along = torch.stack([torch.full_like(answers, IGNORE), torch.where(closes, answers, IGNORE)], dim=2)
            labels = torch.where(labels == IGNORE, along.flatten(1)[:, :width], labels)
        return input_ids, labels

    def _running_values(self, digits: Tensor, operators: Tensor) -> Tensor:
        """Return the value of the expression up to every digit, `[B, N]`. Operator i is between digits i and i + 1."""
        total, term = torch.zeros_like(digits[:, 0]), digits[:, 0]  # of closed terms, and the term that `*` may extend
        values = [term]
        for i in range(1, digits.shape[1]):
            digit, operator = digits[:, i], operators[:, i - 1]
            is_product = operator == self.times
            total = torch.where(is_product, total, (total + term) % self.num_classes)
            fresh = torch.where(operator == self.minus, -digit, digit)
            term = torch.where(is_product, term * digit % self.num_classes, fresh)
            values.append((total + term) % self.num_classes)
        return torch.stack(values, dim=1)

    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        m = self.num_classes
        residues = torch.arange(m)
        sums = (residues[:, None] + residues).flatten() % m
        products = (residues[:, None] * residues) % m
        times = torch.zeros(m, m, dtype=torch.float64)  # from a term p to p times a uniform digit
        times.scatter_add_(1, products, torch.full((m, m), 1 / m, dtype=torch.float64))
        joint = torch.zeros(m, m, dtype=torch.float64)  # distribution of (total, term)
        joint[0] = 1 / m
        by_size, along = {}, torch.zeros(m, dtype=torch.float64)  # expected labels by answer
        for size in range(3, max_length + 1, 2):
            value = torch.zeros(m, dtype=torch.float64).index_add_(0, sums, joint.flatten())
            by_size[size] = value + along
            if self.answers_along_the_way:
                along = along + 2 / 3 * value
            # + and - close the term and start a uniform one; * extends it.
            joint = 2 / 3 * value[:, None] / m + joint @ times / 3
        answers = mean_over_sizes(by_size, self.sizes(min_length, max_length))
        return answers / answers.sum()
