"""Test formal languages without brackets against slow Python that reads the tokens one by one."""

import ast
import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from chi_square import assert_distributed

from lrnn.errors import UserError
from lrnn.track.tasks.formal_languages import CycleNavigation, EvenPairs, ModularArithmetic, Parity

SEED = 4


def samples(task, count, min_length, max_length):
    """Return (content ids, answer id, length) of each sample, after checking the layout."""
    batch = task.batch(SEED, torch.arange(count), min_length, max_length)
    assert batch.input_ids.shape == batch.labels.shape == (count, max_length)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64
    out = []
    for ids, labels, length in zip(*(tensor.tolist() for tensor in batch), strict=True):
        assert min_length <= length <= max_length
        assert all(i == task.pad_id for i in ids[length - 1 :])  # the answer's slot is masked
        assert all(label == -100 for t, label in enumerate(labels) if t != length - 2)
        assert task.pad_id not in ids[: length - 1] and max(ids) < task.vocab_size
        answer = labels[length - 2]
        assert task.first_answer_id <= answer < task.first_answer_id + task.num_classes
        out.append((ids[: length - 1], answer, length))
    return out


def evaluate(expression, modulus):
    """Return the value of a Python expression of + - * over digits, by walking Python's own syntax tree."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        left, right = walk(node.left), walk(node.right)
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]

    return walk(ast.parse(expression, mode="eval").body) % modulus


def exact_distribution(answers, classes):
    """Return the frequencies of all possible answers, as floats of exact fractions."""
    counts = Counter(answers)
    return [float(Fraction(counts[c], sum(counts.values()))) for c in range(classes)]


def test_parity():
    for content, answer, _ in samples(Parity(), 500, 2, 40):
        state = 1
        for bit in content:
            assert bit in (1, 2)
            state = 3 - state if bit == 2 else state
        assert answer == state


def test_even_pairs_counts_the_pairs():
    for content, answer, _ in samples(EvenPairs(), 500, 2, 40):
        pairs = sum(a != b for a, b in itertools.pairwise(content))
        assert answer == (1 if pairs % 2 == 0 else 2)


@pytest.mark.parametrize("cycle", [2, 5, 7])
def test_cycle_navigation_walks(cycle):
    for content, answer, _ in samples(CycleNavigation(cycle), 500, 2, 40):
        ring = list(range(cycle))
        for move in content:
            turn = {1: 0, 2: 1, 3: -1}[move]
            ring = ring[turn:] + ring[:turn] if turn else ring
        assert answer == 4 + ring[0]


@pytest.mark.parametrize("modulus", [2, 5, 11])
def test_modular_arithmetic_keeps_precedence(modulus):
    for content, answer, length in samples(ModularArithmetic(modulus), 500, 3, 40):
        assert length % 2 == 1 and content[-1] == 4
        text = " ".join({1: "+", 2: "-", 3: "*"}.get(i, str(i - 5)) for i in content[:-1])
        assert answer == 5 + evaluate(text, modulus)


@pytest.mark.parametrize("modulus", [2, 5])
def test_running_values_equal_the_answers_of_expressions_that_end_there(modulus):
    plain = ModularArithmetic(modulus).batch(SEED, torch.arange(300), 3, 40)
    batch = ModularArithmetic(modulus, running_values=True).batch(SEED, torch.arange(300), 3, 40)
    assert torch.equal(plain.input_ids, batch.input_ids)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
            text = " ".join({1: "+", 2: "-", 3: "*"}.get(i, str(i - 5)) for i in ids[:t])
            assert label == (5 + evaluate(text, modulus) if token in (1, 2, 4) else -100)


def test_a_known_expression():
    # 3 - 4 * 2 + 1 = -4 = 1 (mod 5): precedence and a negative value.
    digits, operators = torch.tensor([[3, 4, 2, 1]]), torch.tensor([[2, 3, 1, 1]])
    assert ModularArithmetic(5)._running_values(digits, operators).tolist() == [[3, 4, 0, 1]]


def test_bits_moves_digits_operators_and_lengths_are_uniform():
    drawn = samples(Parity(), 4000, 3, 40)
    assert_distributed([length for *_, length in drawn], {n: 1 / 38 for n in range(3, 41)})
    assert_distributed([bit for content, *_ in drawn for bit in content], {1: 1 / 2, 2: 1 / 2})
    drawn = samples(CycleNavigation(), 4000, 3, 40)
    assert_distributed([move for content, *_ in drawn for move in content], {i: 1 / 3 for i in (1, 2, 3)})
    drawn = samples(ModularArithmetic(), 4000, 3, 40)
    assert_distributed([length for *_, length in drawn], {n: 1 / 19 for n in range(3, 40, 2)})
    assert_distributed([i for content, *_ in drawn for i in content[:-1:2]], {i: 1 / 5 for i in range(5, 10)})
    assert_distributed([i for content, *_ in drawn for i in content[1:-1:2]], {i: 1 / 3 for i in (1, 2, 3)})


def test_the_papers_test_range_gives_odd_sizes_of_arithmetic():
    assert ModularArithmetic().sizes(40, 256) == list(range(41, 256, 2))


def test_answer_distributions_by_enumeration():
    for size in (2, 3, 5):
        words = list(itertools.product((0, 1), repeat=size - 1))
        expected = exact_distribution([word[0] != word[-1] for word in words], 2)
        assert EvenPairs().answer_distribution(size, size).tolist() == pytest.approx(expected)
        assert Parity().answer_distribution(size, size).tolist() == [0.5, 0.5]
        walks = [sum(word) % 5 for word in itertools.product((0, 1, -1), repeat=size - 1)]
        expected = exact_distribution(walks, 5)
        assert CycleNavigation().answer_distribution(size, size).tolist() == pytest.approx(expected)
    for digits in (1, 2, 3):
        answers, along = [], []
        for numbers in itertools.product("0123", repeat=digits):
            for operators in itertools.product("+-*", repeat=digits - 1):
                text = "".join(itertools.chain(*itertools.zip_longest(numbers, operators, fillvalue="")))
                answers.append(evaluate(text, 4))
                along += [evaluate(text[:i], 4) for i, symbol in enumerate(text + "=") if symbol in "+-="]
        got = ModularArithmetic(4).answer_distribution(2 * digits + 1, 2 * digits + 1)
        assert got.tolist() == pytest.approx(exact_distribution(answers, 4))
        got = ModularArithmetic(4, running_values=True).answer_distribution(2 * digits + 1, 2 * digits + 1)
        assert got.tolist() == pytest.approx(exact_distribution(along, 4))


@pytest.mark.parametrize("task", [Parity(), EvenPairs(), CycleNavigation(), ModularArithmetic()])
def test_answer_distributions_of_a_range_by_sampling(task):
    low, high = (2, 6) if not isinstance(task, ModularArithmetic) else (3, 8)
    distribution = task.answer_distribution(low, high)
    assert distribution.sum().item() == pytest.approx(1)
    answers = [answer - task.first_answer_id for _, answer, _ in samples(task, 20_000, low, high)]
    assert_distributed(answers, dict(enumerate(distribution.tolist())))
    assert task.majority_floor(low, high) == distribution.max().item()


def test_bad_sizes_and_parameters():
    with pytest.raises(UserError, match="must be odd"):
        ModularArithmetic().batch(SEED, torch.arange(2), 40, 40)
    for task, smallest in ((Parity(), 2), (EvenPairs(), 2), (CycleNavigation(), 2), (ModularArithmetic(), 3)):
        with pytest.raises(UserError, match=f"smallest size is {smallest}"):
            task.batch(SEED, torch.arange(2), smallest - 1, 40)
        with pytest.raises(UserError, match="above max_length"):
            task.batch(SEED, torch.arange(2), 41, 40)
    for bad in (1, 0, -3, 2.5, "5", True, 1001):
        with pytest.raises(UserError, match="modulus"):
            ModularArithmetic(bad)
        with pytest.raises(UserError, match="cycle_length"):
            CycleNavigation(bad)
    with pytest.raises(UserError, match="running_values must be true or false, not 'yes'"):
        ModularArithmetic(running_values="yes")
