"""Test arithmetic with brackets against a recursive reader of its grammar and recursive probabilities."""

import ast
from fractions import Fraction
from functools import cache

import pytest
import torch
from chi_square import assert_distributed

from lrnn.errors import UserError
from lrnn.track.tasks.bracket_arithmetic import BracketArithmetic

SEED = 4


def samples(task, count, min_length, max_length):
    """Return (expression as text, answer, length) of each sample, after checking the layout."""
    symbols = [*map(str, range(task.num_classes)), "+", "-", "*", "(", ")", "=", "PAD"]
    assert len(symbols) == task.vocab_size
    batch = task.batch(SEED, torch.arange(count), min_length, max_length)
    assert batch.input_ids.shape == batch.labels.shape == (count, max_length)
    out = []
    for ids, labels, length in zip(*(tensor.tolist() for tensor in batch), strict=True):
        text = [symbols[i] for i in ids]
        assert text[length - 3] == "=" and "=" not in text[: length - 3] and "PAD" not in text[: length - 3]
        assert set(text[length - 2 :]) == {"PAD"}
        assert all(label == -100 for t, label in enumerate(labels) if t != length - 3)
        out.append((text[: length - 3], labels[length - 3], length))
    return out


def value(text, modulus):
    """Return the value, by walking Python's syntax tree of the expression."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        left, right = walk(node.left), walk(node.right)
        return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]

    return walk(ast.parse("".join(text), mode="eval").body) % modulus


def read(text):
    """Return the nested (left, operator, right) of a list of tokens, by the paper's grammar; leaves are tokens."""
    if len(text) < 5:
        shapes = {1: "d", 2: "-d", 3: "(d)", 4: "(-d)"}
        assert "".join("d" if token.isdigit() else token for token in text) == shapes[len(text)]
        return tuple(text)
    assert text[0] == "(" and text[-1] == ")"
    inside, end, depth = text[1:-1], 0, 0
    # The left part ends at the first operator outside brackets that is not a sign.
    while not (depth == 0 and end > 0 and inside[end] in "+-*" and not (end == 1 and inside[0] == "-")):
        depth += {"(": 1, ")": -1}.get(inside[end], 0)
        end += 1
    return read(inside[:end]), inside[end], read(inside[end + 1 :])


def size(tree):
    return len(tree) if not isinstance(tree[0], tuple) else 3 + size(tree[0]) + size(tree[2])


def nodes(tree):
    yield tree
    if isinstance(tree[0], tuple):
        yield from nodes(tree[0])
        yield from nodes(tree[2])


@pytest.mark.parametrize("operators", ["+-", "+-*"])
@pytest.mark.parametrize("modulus", [2, 5, 13])
def test_values_and_grammar(modulus, operators):
    task = BracketArithmetic(modulus, operators)
    for low, high, count in ((3, 40, 400), (200, 256, 30)):
        for text, answer, _ in samples(task, count, low, high):
            assert value(text, modulus) == answer
            assert size(read(text)) == len(text)


@pytest.mark.parametrize("operators", ["+-", "+-*"])
def test_splits_operators_and_digits_are_uniform_at_every_depth(operators):
    splits, seen_operators, digits = {}, {"root": [], "inner": []}, {n: [] for n in (1, 2, 3, 4)}
    for text, *_ in samples(BracketArithmetic(5, operators), 4000, 43, 43):
        root = read(text)
        for node in nodes(root):
            if isinstance(node[0], tuple):
                splits.setdefault((node is root, size(node)), []).append(size(node[0]))
                seen_operators["root" if node is root else "inner"].append(node[1])
            else:
                digits[len(node)].extend(token for token in node if token.isdigit())
    assert {n for is_root, n in splits if not is_root} == set(range(5, 37))
    for (_, length), left in splits.items():
        if len(left) > 5 * (length - 4):
            assert_distributed(left, {n: 1 / (length - 4) for n in range(1, length - 3)})
    for found in seen_operators.values():
        assert_distributed(found, {operator: 1 / len(operators) for operator in operators})
    for found in digits.values():
        assert_distributed(found, {str(digit): 1 / 5 for digit in range(5)})


def test_draws_within_an_expression_are_independent():
    # Expressions of 10 tokens whose left part is one digit: `(d op right)`, the right part `(l op r)` of 6 tokens.
    roots = [read(text) for text, *_ in samples(BracketArithmetic(), 30_000, 13, 13)]
    drawn = [(left[0], op, right[1], right[2][-1]) for left, op, right in roots if size(left) == 1]
    cells = [(d, o, p, e) for d in "01234" for o in "+-*" for p in "+-*" for e in "01234"]
    assert_distributed(drawn, {cell: 1 / 225 for cell in cells})


def test_sizes_below_five_become_five_as_released():
    lengths = [length for *_, length in samples(BracketArithmetic(), 8000, 3, 10)]
    assert_distributed(lengths, {5: 3 / 8, **{n: 1 / 8 for n in range(6, 11)}})


@cache
def reference_distribution(length, modulus, operators):
    """Return exact probabilities of an expression's values, by recursion over Python's fractions."""
    if length < 5:
        return tuple(Fraction(1, modulus) for _ in range(modulus))
    total = [Fraction(0)] * modulus
    for left in range(1, length - 3):
        for a, p in enumerate(reference_distribution(left, modulus, operators)):
            for b, q in enumerate(reference_distribution(length - left - 3, modulus, operators)):
                for operator in operators:
                    result = {"+": a + b, "-": a - b, "*": a * b}[operator] % modulus
                    total[result] += p * q / ((length - 4) * len(operators))
    return tuple(total)


@pytest.mark.parametrize("operators", ["+-", "+-*"])
@pytest.mark.parametrize("modulus", [2, 5])
def test_answer_distribution_by_fractions(modulus, operators):
    task = BracketArithmetic(modulus, operators)
    for n in (1, 5, 8, 20):
        if n + 3 >= 5:
            expected = [float(p) for p in reference_distribution(n, modulus, operators)]
            assert task.answer_distribution(n + 3, n + 3).tolist() == pytest.approx(expected)
    of_sizes = [reference_distribution(n, modulus, operators) for n in (2, 2, *range(2, 8))]  # 3 and 4 become 5
    mean = [float(sum(p) / 8) for p in zip(*of_sizes, strict=True)]
    assert task.answer_distribution(3, 10).tolist() == pytest.approx(mean)


def test_majority_floor_equals_the_papers():
    always_zero = BracketArithmetic(5, "+-*")
    floor = always_zero.majority_floor(40, 256)
    assert always_zero.answer_distribution(40, 256).argmax() == 0
    assert 0.12 <= (floor - 1 / 5) / (1 - 1 / 5) < 0.135
    batch = always_zero.batch(SEED, torch.arange(8192), 40, 256)
    answers = batch.labels[batch.labels != -100]
    share = (answers == 0).double().mean().item()
    assert len(answers) == 8192 and abs(share - floor) < 4 * (floor * (1 - floor) / 8192) ** 0.5
    assert BracketArithmetic(5, "+-").majority_floor(40, 256) == pytest.approx(1 / 5)


def test_bad_parameters_and_sizes():
    with pytest.raises(UserError, match="modulus"):
        BracketArithmetic(1)
    with pytest.raises(UserError, match="operators"):
        BracketArithmetic(5, "+*")
    with pytest.raises(UserError, match="smallest size is 3"):
        BracketArithmetic().batch(SEED, torch.arange(2), 2, 40)
    with pytest.raises(UserError, match="at least 5"):
        BracketArithmetic().batch(SEED, torch.arange(2), 3, 4)
    with pytest.raises(UserError, match="running_values must be true or false, not 1"):
        BracketArithmetic(running_values=1)


@pytest.mark.parametrize(("modulus", "operators"), [(5, "+-*"), (5, "+-"), (7, "+-*")])
def test_running_values_are_those_of_the_text_read_so_far_with_its_brackets_closed(modulus, operators):
    symbols = [*map(str, range(modulus)), "+", "-", "*", "(", ")"]
    plain = BracketArithmetic(modulus, operators).batch(SEED, torch.arange(300), 5, 60)
    batch = BracketArithmetic(modulus, operators, running_values=True).batch(SEED, torch.arange(300), 5, 60)
    assert torch.equal(plain.input_ids, batch.input_ids)
    for ids, labels, last, length in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), plain.labels.tolist(), batch.lengths.tolist(), strict=True
    ):
        text = [symbols[i] for i in ids[: length - 3]]
        for t, token in enumerate(text):
            read = text[: t + 1]
            closed = [*read, *")" * (read.count("(") - read.count(")"))]
            assert labels[t] == (value(closed, modulus) if token.isdigit() else -100)
        assert labels[length - 3 :] == last[length - 3 :]


def test_frequency_of_running_values():
    """Values along an expression depend on one another, so this is a bound on frequencies, not a test of them."""
    for operators in ("+-", "+-*"):
        task = BracketArithmetic(5, operators, running_values=True)
        labels = task.batch(SEED, torch.arange(40_000), 5, 24).labels
        counts = labels[labels != -100].bincount(minlength=5)
        torch.testing.assert_close(task.answer_distribution(5, 24), counts / counts.sum().double(), atol=3e-3, rtol=0)
        plain = BracketArithmetic(5, operators).answer_distribution(5, 24)
        assert operators == "+-" or (task.answer_distribution(5, 24) - plain).abs().max() > 0.01
