"""Test the programs: Python gives the answers, controls are at chance, halves do not mix, training documents."""

import doctest
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from python_answers import answer, last_literal, split

from lrnn.traces.formats import FORMATS
from lrnn.traces.program import EVALUATION, TRAINING, Rng
from lrnn.traces.training import training_document

LENGTHS = (4, 5, 7, 16, 33)
DIGEST = "48615ace34dba69200308ec66a33ae31bf61f55bcaf9ecf1782448dc1142ec3c"


def half_of(question):
    """Return the half of a program, from its text alone."""
    start, changes, _ = split(question)
    return hashlib.sha256("\n".join([*start, *changes[:4]]).encode()).digest()[0] % 2


def without_changes(question):
    start, _, last = split(question)
    return "\n".join([*start, last]) + ("\n" if question.endswith("\n") else "")


def programs_of(document):
    """Return (question, answer) of every program in a training document."""
    assert document.endswith("\n") and not document.endswith("\n\n")
    for program in document.removesuffix("\n").split("\n\n"):
        if program.startswith(">>> "):
            question, right = program.rsplit("\n", 1)
            yield question + "\n", right
        else:
            yield tuple(program.rsplit(" ", 1))


@pytest.mark.parametrize("name", FORMATS)
def test_python_gives_the_answer(name):
    task, rng = FORMATS[name], Rng("python")
    wanted = [(length, number) for length in LENGTHS for number in range(len(task.choices))] + [(512, 1)]
    for length, number in wanted:
        program = task.draw(rng, length, number)
        assert len(program.changes) == length == len(split(program.text)[1])
        assert answer(program.text, task.choices) == task.choices[number] and program.answer == number
        assert task.solved(program).removeprefix(program.text).strip(" ") == task.choices[number]
        assert answer(without_changes(program.text), task.choices) == program.initial
        if name != "trace_stack_depth":
            assert program.last == last_literal(program.text)


def test_a_solved_session_is_one_that_python_shows():
    task = FORMATS["trace_repl_4"]
    session = task.solved(task.draw(Rng("session"), 18, 3)) + "\n"
    test = doctest.DocTestParser().get_doctest(session, {}, "session", None, 0)
    assert session.count("print") == 5
    assert doctest.DocTestRunner(verbose=False).run(test) == (0, 24)


@pytest.mark.parametrize("name", FORMATS)
def test_what_needs_no_tracking_is_right_as_often_as_a_guess(name):
    task, rng, n = FORMATS[name], Rng("controls"), 1500
    k = len(task.choices)
    programs = [task.draw(rng, 4, number % k) for number in range(n)]  # the fewest changes show the most
    for control in ("initial", "last"):
        given = [getattr(program, control) for program in programs]
        if given[0] is not None:
            right = sum(g == task.choices[p.answer] for g, p in zip(given, programs, strict=True))
            assert abs(right / n - 1 / k) < 4 * ((k - 1) / k**2 / n) ** 0.5, control


@pytest.mark.parametrize("name", FORMATS)
def test_programs_that_begin_alike_are_in_the_same_half(name):
    task, rng = FORMATS[name], Rng("halves")
    for number in range(20):
        program = task.draw(rng, 4 + number, number % len(task.choices))
        assert program.half == half_of(program.text)
    assert {task.draw_of_half(rng, 4, 0, half).half for half in (TRAINING, EVALUATION)} == {TRAINING, EVALUATION}


def test_the_answer_depends_on_early_changes():
    """What a stack holds at the end was pushed anywhere; a bit of an automaton's log is never forgotten."""
    pushed = Counter()
    for number in range(200):
        _, changes, _ = split(FORMATS["trace_stack_top"].draw(Rng(f"{number}"), 64, number % 3).text)
        depth, place = 0, 0
        for line_number, line in reversed(list(enumerate(changes))):
            depth += 1 if line == "stack.pop()" else -1
            if depth < 0:
                place = line_number
                break
        pushed[place // 16] += 1
    assert min(pushed[quarter] for quarter in range(4)) > 25


def test_training_documents_are_solved_programs_of_the_other_half():
    documents = [training_document(number, 24) for number in range(120)]
    assert len(set(documents)) == len(documents)
    lengths, answers, kinds = Counter(), Counter(), Counter()
    for document in documents:
        programs = list(programs_of(document))
        kinds[len(programs)] += 1
        for question, right in programs:
            assert half_of(question) == TRAINING
            assert answer(question, [right]) == right
            lengths[len(split(question)[1])] += 1
            answers[right] += 1
    assert kinds.keys() == set(range(1, 7))
    assert min(lengths) == 4 and max(lengths) == 24 and len(lengths) == 21
    # Three octaves are equally likely: 4 to 7, 8 to 15, 16 to 24.
    shares = [sum(lengths[n] for n in range(low, high)) / lengths.total() for low, high in ((4, 8), (8, 16), (16, 25))]
    assert all(abs(share - 1 / 3) < 0.08 for share in shares)
    assert answers.keys() == {choice for task in FORMATS.values() for choice in task.choices}


def test_documents_are_the_same_on_every_machine():
    made = [training_document(number, 128) for number in range(40)]
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest() == DIGEST


def test_the_examples_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text().split("### Tracking in programs")[1]
    (programs,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (session,) = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    exec(programs, {})
    test = doctest.DocTestParser().get_doctest(session, {}, "session", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test) == (0, 6)
    assert set(re.findall(r"trace_\w+", programs)) | {"trace_repl_1", "trace_repl_4", "trace_repl_16"} >= {
        name for name in FORMATS if name != "trace_repl_never"
    }
