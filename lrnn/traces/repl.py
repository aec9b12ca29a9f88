"""A session of the interpreter: five variables that tuple assignments permute, and a value printed now and then.

>>> a, b, c, d, e = 3, 0, 4, 1, 2
>>> a, b, c, d, e = c, a, e, b, d
>>> print(b)
3
>>> a, b, c, d, e = b, a, d, e, c
>>> print(a)
3
"""

from lrnn.traces.permutations import NAMES, assign, draw_word
from lrnn.traces.program import Format, Program, Rng

DEGREE = 5


class Session(Format):
    """Sessions in which every assignment permutes all five variables.

    Args:
        every: print a variable after so many assignments; 0 for never before the question.
    """

    unit = "assignments"
    choices = tuple(map(str, range(DEGREE)))
    delimiter = ""

    def __init__(self, every: int) -> None:
        self.every = every

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        word = draw_word(rng, DEGREE, length, answer)
        values, last, changes = list(word.values), word.values[-1], []
        for number, move in enumerate(word.moves, start=1):
            move.apply(values)
            change = f">>> {move.text}"
            if self.every and number % self.every == 0 and number < length:
                shown = rng.below(DEGREE)
                last = values[shown]
                change += f"\n>>> print({NAMES[shown]})\n{last}"
            changes.append(change)
        return Program(
            start=f">>> {assign(word.values)}",
            changes=tuple(changes),
            question=f">>> print({NAMES[word.asked]})\n",
            answer=answer,
            initial=str(word.values[word.asked]),
            last=str(last),
        )
