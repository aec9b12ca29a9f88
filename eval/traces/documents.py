"""The documents of the suite: programs with solved examples in front, at several lengths, with balanced answers.

At every length all answers are right equally often, so no constant answer beats guessing. All documents of a task have
the same examples, of the half of programs that training documents are made of. The programs that are asked about are of
the other half.
"""

from functools import cache
from typing import TypedDict

from lrnn.errors import UserError
from lrnn.settings import name_hint
from lrnn.traces.formats import FORMATS
from lrnn.traces.program import EVALUATION, TRAINING, Format, Program, Rng

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512)
DOCUMENTS_PER_LENGTH = 60  # a multiple of 2, 3, 4 and 5, the numbers of choices
SHOT_LENGTHS = (5, 6, 7, 9)  # in turn
# By the number of choices: each answer occurs equally often, in an order that suggests no continuation.
SHOT_ANSWERS = {2: (1, 0, 0, 1), 3: (1, 0, 2, 2, 0, 1), 4: (2, 0, 3, 1), 5: (3, 0, 4, 1, 2)}


class Document(TypedDict):
    context: str  # the examples and the program, up to where the answer begins
    choices: list[str]
    answer: int  # the number of the right choice
    length: int
    initial_value: str  # the answer before the first change
    last_value: str | None  # what was written last; None if nothing of the kind is written


@cache
def documents(name: str, seed: int) -> tuple[Document, ...]:
    """Return the documents of the task `name`, alternating lengths and answers so that the first N are a fair subset.

    Raises:
        UserError: the task is unknown.
    """
    if name not in FORMATS:
        raise UserError(f"unknown kind of program {name!r}; {name_hint(name, list(FORMATS), list_all=True)}")
    task = FORMATS[name]
    k = len(task.choices)
    prompt = "".join(f"{task.solved(program)}\n\n" for program in shots(name, seed))
    by_length = [
        programs(task, f"evaluation/{seed}/{name}", length, [(first + i) % k for i in range(DOCUMENTS_PER_LENGTH)])
        for first, length in enumerate(LENGTHS)
    ]
    return tuple(
        Document(
            context=prompt + program.text,
            choices=list(task.choices),
            answer=program.answer,
            length=length,
            initial_value=program.initial,
            last_value=program.last,
        )
        for row in zip(*by_length, strict=True)
        for length, program in zip(LENGTHS, row, strict=True)
    )


def shots(name: str, seed: int) -> list[Program]:
    """Return the programs that are shown with their answers."""
    task, rng = FORMATS[name], Rng(f"examples/{seed}/{name}")
    answers = SHOT_ANSWERS[len(task.choices)]
    lengths = [SHOT_LENGTHS[number % len(SHOT_LENGTHS)] for number in range(len(answers))]
    return [task.draw_of_half(rng, n, answer, TRAINING) for n, answer in zip(lengths, answers, strict=True)]


def programs(task: Format, key: str, length: int, answers: list[int]) -> list[Program]:
    """Return a program for every answer, all of them different, drawn with `key`."""
    rng, found = Rng(f"{key}/{length}"), dict[str, Program]()
    for answer in answers:
        program = task.draw_of_half(rng, length, answer, EVALUATION)
        while program.text in found:
            program = task.draw_of_half(rng, length, answer, EVALUATION)
        found[program.text] = program
    return list(found.values())
