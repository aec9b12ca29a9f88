"""Documents for a corpus, in the formats that evaluation asks about, of the half of programs that it never shows."""

import re

from lrnn.traces.formats import FORMATS
from lrnn.traces.program import SHORTEST, TRAINING, Rng

MOST_PROGRAMS = 6  # per document
ANSWER = re.compile(r"\S+(?=\n\n|\n?\Z)")  # the last word of a program


def training_document(number: int, most_changes: int) -> str:
    """Return document `number`: one to six solved programs of one format, with blank lines between.

    Args:
        number: any; the document is a function of it and of `most_changes`.
        most_changes: state changes of the longest program, at least `SHORTEST`. Short ones are more frequent: all
            powers of two are equally likely, and all lengths from one power to the next.
    """
    rng = Rng(f"training/{most_changes}/{number}")
    programs = []
    task = FORMATS[rng.choice(list(FORMATS))]
    for _ in range(1 + rng.below(MOST_PROGRAMS)):
        low = SHORTEST << rng.below((most_changes // SHORTEST).bit_length())
        length = low + rng.below(min(2 * low, most_changes + 1) - low)
        answer = rng.below(len(task.choices))
        programs.append(task.solved(task.draw_of_half(rng, length, answer, TRAINING)))
    return "\n\n".join(programs) + "\n"


def answer_spans(text: str) -> list[tuple[int, int]]:
    """Return where the answers are in a training document, as (start, end) in characters without the end."""
    return [found.span() for found in ANSWER.finditer(text)]
