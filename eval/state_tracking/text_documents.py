"""The documents of the state-tracking tasks as text: prompts with solved examples, by length, answers in balance.

For every length the documents' right answers go through the choices in turn: a sample is drawn, as the generator draws
it, from those with the wanted answer. So all answers are equally often right at every length, and no constant answer
beats guessing. Documents of short lengths repeat, where there are few different ones.

The examples in front are the same for all documents of a task. They come from the split `train`, the documents from
`test`, and no example has the length of a document, so that none is a document.
"""

from functools import cache
from typing import TypedDict

import torch

from lrnn.errors import UserError
from lrnn.eval.state_tracking.text_tasks import TEXT_TASKS, TextTask
from lrnn.track.tasks.counter_rng import split_seed

LENGTHS = (4, 8, 16, 32, 64, 128, 256)
DOCUMENTS_PER_LENGTH = 120  # a multiple of 2, 3 and 5, the numbers of choices
SHOT_LENGTHS = (3, 5, 6, 7)  # by turns
# The right answers of the examples, by the number of choices: each equally often, and in no order to go on with.
SHOT_ANSWERS = {2: (1, 0, 0, 1), 3: (1, 0, 2, 2, 0, 1), 5: (3, 0, 4, 1, 2)}
SEED = 0
CANDIDATES = 1024  # samples of each length to choose from
INDICES_PER_LENGTH = 2**20  # sample numbers, so that no length begins as another does


class Document(TypedDict):
    context: str  # the examples and the question, up to where the answer begins
    choices: list[str]
    answer: int  # the number of the right choice
    length: int


@cache
def documents(name: str) -> tuple[Document, ...]:
    """The documents of the task `name`, the lengths and the answers by turns, so that the first N are a fair choice.

    Raises UserError for an unknown task.
    """
    if name not in TEXT_TASKS:
        raise UserError(f"unknown text task {name!r}. The text tasks are: {', '.join(TEXT_TASKS)}")
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
    """The solved examples: (question, number of the right choice)."""
    answers = SHOT_ANSWERS[len(task.choices)]
    lengths = [SHOT_LENGTHS[number % len(SHOT_LENGTHS)] for number in range(len(answers))]
    return [questions(task, "train", length, [answer])[0] for length, answer in zip(lengths, answers, strict=True)]


def questions(task: TextTask, split: str, length: int, wanted: list[int]) -> list[tuple[str, int]]:
    """One sample of the split for every wanted answer, the first that has it and was not taken: (question, answer)."""
    indices = torch.arange(CANDIDATES) + length * INDICES_PER_LENGTH
    ids, answers = task.draw(split_seed(SEED, split), indices, length)
    rows = [iter((answers == choice).nonzero()[:, 0].tolist()) for choice in range(len(task.choices))]
    return [(task.question(ids[next(rows[answer])].tolist()), answer) for answer in wanted]
