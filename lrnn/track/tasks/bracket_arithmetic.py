"""Modular arithmetic with brackets (arXiv 2411.12537 section 5.1), generated for a whole batch at once.

An expression of n tokens is `d`, `-d`, `(d)` or `(-d)` for n from 1 to 4, otherwise `(left op right)` with the left
length uniform in 1..n-4. There is no recursion per sample: all expressions of the batch at the same depth are split in
one step, and values are then folded from the deepest level up. Every expression starts at a different token, so its
start serves as the counter of its random draws and as the place of its value.
"""

import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.track.tasks.base import Task, check_bool, check_integer, mean_over_sizes, one_answer, size_range
from lrnn.track.tasks.counter_rng import Field, integers
from lrnn.track.tasks.formal_languages import MAX_MODULUS

OPERATORS = ("+", "-", "*")
AROUND = 3  # tokens of a sequence besides its expression: `=`, the answer and one PAD
SMALLEST = 5


class BracketArithmetic(Task):
    """An expression of `size - 3` tokens and `=`; the answer is the value modulo `modulus`.

    Digits are ids 0..modulus-1, then `+ - * ( ) =` (5-10 modulo 5), PAD last (11). `operators` is "+-" (what the
    released generator makes) or "+-*" (Table 3 of the paper). As in the released generator a size below 5 becomes 5.
    With `running_values` (not in the paper) the label at every digit is the value of the expression if it ended there
    with all brackets closed.
    """

    first_answer_id = 0

    def __init__(self, modulus: int = 5, operators: str = "+-*", running_values: bool = False) -> None:
        self.num_classes = check_integer("modular_arithmetic_brackets", "modulus", modulus, 2, MAX_MODULUS)
        if operators not in ("+-", "+-*"):
            raise UserError(f"modular_arithmetic_brackets: operators must be '+-' or '+-*', not {operators!r}")
        self.operators = operators
        self.answers_along_the_way = check_bool("modular_arithmetic_brackets", "running_values", running_values)
        self.plus, self.minus, self.times, self.open, self.close, self.equals = range(modulus, modulus + 6)
        self.pad_id = modulus + 6
        self.vocab_size = modulus + 7
        self.answer_table = (torch.arange(modulus)[:, None] + torch.arange(modulus)) % modulus  # `=` acts as `+`

    def sizes(self, min_length: int, max_length: int) -> list[int]:
        sizes = size_range("modular_arithmetic_brackets", min_length, max_length, smallest=3)
        if max_length < SMALLEST:
            raise UserError(f"modular_arithmetic_brackets: max_length must be at least {SMALLEST}, not {max_length}")
        return [max(size, SMALLEST) for size in sizes]

    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        expression_lengths = lengths - AROUND
        content, answer, so_far = self.expressions(keys, expression_lengths, width)
        content.scatter_(1, expression_lengths[:, None], self.equals)
        input_ids, labels = one_answer(content, expression_lengths + 1, answer, self.pad_id)
        if self.answers_along_the_way:
            labels = torch.where(input_ids < self.num_classes, so_far, labels)
        return input_ids, labels

    def expressions(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Generate expressions with these keys and lengths (`[B]` int64).

        Returns:
            Token ids `[B, width]`, with the pad id after an expression's end; the values `[B]`; and `[B, width]`, at
            every digit, the value of the expression if it ended there.
        """
        tokens = torch.full((len(keys), width), self.pad_id, device=keys.device)
        values = torch.empty_like(tokens)  # the value of an expression, at its first token
        flat_tokens, flat_values = tokens.view(-1), values.view(-1)
        first = torch.arange(len(keys), device=keys.device) * width
        start = first  # into the flat tensors
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        leaves: list[tuple[Tensor, Tensor]] = []
        while len(start):
            short = lengths < SMALLEST
            digits = self._write_short(flat_tokens, flat_values, keys, start[short], lengths[short], width)
            leaves.append((start[short], digits))
            start, lengths = start[~short], lengths[~short]
            left, operator = self._split(keys, start, lengths, width)
            middle = start + 1 + left
            flat_tokens[start] = self.open
            flat_tokens[middle] = operator
            flat_tokens[start + lengths - 1] = self.close
            levels.append((start, middle, operator))
            start, lengths = torch.cat([start + 1, middle + 1]), torch.cat([left, lengths - left - 3])
        for start, middle, operator in reversed(levels):
            flat_values[start] = self._apply(operator, flat_values[start + 1], flat_values[middle + 1])
        return tokens, values[:, 0], self._so_far(first, levels, leaves, flat_values).view_as(tokens)

    def _so_far(
        self,
        first: Tensor,
        levels: list[tuple[Tensor, Tensor, Tensor]],
        leaves: list[tuple[Tensor, Tensor]],
        values: Tensor,
    ) -> Tensor:
        """Return, at every digit, the value of its sample's expression if that ended there.

        That value is `slope * x + offset` of the value x of the innermost expression. The left part of an expression
        inherits both numbers. For the right part, x is replaced by v + x, v - x or v * x, where v is the left value.
        """
        m = self.num_classes
        slope, offset, so_far = torch.zeros(3, len(values), dtype=torch.int64, device=values.device)
        slope[first] = 1
        for start, middle, operator in levels:
            left, right, v = start + 1, middle + 1, values[start + 1]
            slope[left], offset[left] = slope[start], offset[start]
            is_product = operator == self.times
            factor = torch.where(operator == self.minus, -1, torch.where(is_product, v, 1))
            added = torch.where(is_product, 0, slope[start] * v)
            slope[right], offset[right] = slope[start] * factor % m, (offset[start] + added) % m
        for start, digit in leaves:
            so_far[digit] = (slope[start] * values[start] + offset[start]) % m
        return so_far

    def _split(self, keys: Tensor, start: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the left lengths and the operators' ids of long expressions, `[N]` each."""
        sample, place = start // width, start % width
        left = integers(keys[sample], Field.SPLIT, place, lengths - 4) + 1
        operator = integers(keys[sample], Field.OPERATOR, place, len(self.operators)) + self.plus
        return left, operator

    def _write_short(
        self, tokens: Tensor, values: Tensor, keys: Tensor, start: Tensor, lengths: Tensor, width: int
    ) -> Tensor:
        """Write `d`, `-d`, `(d)` or `(-d)` and its value at every start, by length. Return the places of the digits."""
        digit = integers(keys[start // width], Field.SYMBOL, start % width, self.num_classes)
        negative, bracketed = lengths % 2 == 0, lengths >= 3
        opening = bracketed.long()
        # Later lines overwrite earlier ones for forms without a sign or bracket.
        tokens[start] = self.open
        tokens[start + lengths - 1] = self.close
        tokens[(start + opening)[negative]] = self.minus
        tokens[start + opening + negative] = digit
        values[start] = torch.where(negative, -digit % self.num_classes, digit)
        return start + opening + negative

    def _apply(self, operator: Tensor, left: Tensor, right: Tensor) -> Tensor:
        total = torch.where(operator == self.minus, left - right, left + right)
        return torch.where(operator == self.times, left * right, total) % self.num_classes

    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        m = self.num_classes
        sizes = self.sizes(min_length, max_length)
        residues = torch.arange(m)
        pairs = residues.repeat_interleave(m), residues.repeat(m)
        longest = max(sizes) - AROUND
        by_length = torch.full((longest + 1, m), 1 / m, dtype=torch.float64)  # a digit and its negative are uniform
        so_far = by_length.clone()  # expected number of digits by running value; a short expression has one digit
        for length in range(SMALLEST, longest + 1):
            left, right = by_length[1 : length - 3].T / (length - 4), slice(1, length - 3)
            by_length[length] = self._values(left @ by_length[right].flip(0), pairs)
            so_far[length] = so_far[right].mean(0) + self._values(left @ so_far[right].flip(0), pairs)
        wanted = by_length + so_far if self.answers_along_the_way else by_length
        answers = mean_over_sizes({size: wanted[size - AROUND] for size in sizes}, sizes)
        return answers / answers.sum()

    def _values(self, joint: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the distribution of `left op right`, given that of (left, right), for a uniformly drawn operator."""
        total = torch.zeros(self.num_classes, dtype=torch.float64)
        for operator in range(self.plus, self.plus + len(self.operators)):
            total.index_add_(0, self._apply(torch.tensor(operator), *pairs), joint.flatten())
        return total / len(self.operators)
