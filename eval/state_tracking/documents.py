"""The documents of the text tasks: prompts with solved examples, at several lengths, with balanced answers.

At every length the right answers of the documents cycle through the choices: each document is the next sample of the
generator with the wanted answer. All answers are therefore right equally often at every length, and no constant answer
beats guessing. At short lengths, where there are few different samples, documents repeat.

The solved examples are the same for all documents of a task. They come from the split `train`, the documents from
`test`. No example has the length of a document, so no example is a document.
"""

from functools import cache
from typing import TypedDict

import torch

from lrnn.errors import UserError
from lrnn.eval.state_tracking.tasks import TEXT_TASKS, TextTask
from lrnn.settings import name_hint
from lrnn.track.tasks.counter_rng import split_seed

LENGTHS = (4, 8, 16, 32, 64, 128, 256)
DOCUMENTS_PER_LENGTH = 120  # a multiple of 2, 3 and 5, the numbers of choices
SHOT_LENGTHS = (3, 5, 6, 7)  # in turn
# By the number of choices: each answer occurs equally often, in an order that suggests no continuation.
SHOT_ANSWERS = {2: (1, 0, 0, 1), 3: (1, 0, 2, 2, 0, 1), 5: (3, 0, 4, 1, 2)}
SEED = 0
CANDIDATES = 1024  # samples per length to choose from
INDICES_PER_LENGTH = 2**20  # sample numbers reserved per length, so that no two lengths begin alike


class Document(TypedDict):
    context: str  # the examples and the question, up to where the answer begins
    choices: list[str]
    answer: int  # the number of the right choice
    length: int


@cache
def documents(name: str) -> tuple[Document, ...]:
    """Return the documents of the task `name`, alternating lengths and answers so that the first N are a fair subset.

    Raises:
        UserError: the task is unknown.
    """
    if name not in TEXT_TASKS:
        raise UserError(f"unknown text task {name!r}; {name_hint(name, list(TEXT_TASKS), list_all=True)}")
    task = TEXT_TASKS[name]
    k = len(task.choices)
    examples = "".join(f"{question} {task.choices[answer]}\n\n" for question, answer in shots(task))
    by_length = [
        questions(task, "test", length, [(first + number) % k for number in range(DOCUMENTS_PER_LENGTH)])
        for first, length in enumerate(LENGTHS)
    ]
    return tuple(
        Document(context=examples + question, choices=list(task.choices), answer=answer, length=length)
        for row in zip(*by_length, strict=True)
        for length, (question, answer) in zip(LENGTHS, row, strict=True)
    )


def shots(task: TextTask) -> list[tuple[str, int]]:
    """Return the solved examples as (question, number of the right choice)."""
    answers = SHOT_ANSWERS[len(task.choices)]
    lengths = [SHOT_LENGTHS[number % len(SHOT_LENGTHS)] for number in range(len(answers))]
    return [questions(task, "train", length, [answer])[0] for length, answer in zip(lengths, answers, strict=True)]


def questions(task: TextTask, split: str, length: int, wanted: list[int]) -> list[tuple[str, int]]:
    """Return (question, answer) for every wanted answer, from the first unused sample of the split with that answer."""
    indices = torch.arange(CANDIDATES) + length * INDICES_PER_LENGTH
    ids, answers = task.draw(split_seed(SEED, split), indices, length)
    rows = [iter((answers == choice).nonzero()[:, 0].tolist()) for choice in range(len(task.choices))]
    return [(task.question(ids[next(rows[answer])].tolist()), answer) for answer in wanted]
