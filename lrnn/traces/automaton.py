"""The log of a finite automaton: three letters, each a permutation of four states, given as tables.

    x = [2, 0, 3, 1]
    y = [1, 0, 2, 3]
    z = [3, 1, 0, 2]
    state = 1
    state = x[state]
    state = z[state]
    assert state == 3

No letter forgets the state, so the answer depends on every line.
"""

from lrnn.traces.program import Format, Program, Rng

LETTERS = "xyz"
STATES = 4


class Automaton(Format):
    """Logs of automata, each with tables of its own."""

    unit = "steps"
    choices = tuple(map(str, range(STATES)))

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        unmoved = rng.below(STATES) == 0  # as often as by chance
        while True:
            tables = {letter: self._table(rng) for letter in LETTERS}
            word = [rng.choice(LETTERS) for _ in range(length)]
            # Follow the answer back to the state that leads to it.
            start = answer
            for letter in reversed(word):
                start = tables[letter].index(start)
            if (start == answer) == unmoved:
                break
        return Program(
            start="\n".join([*(f"{letter} = {table}" for letter, table in tables.items()), f"state = {start}"]),
            changes=tuple(f"state = {letter}[state]" for letter in word),
            question="assert state ==",
            answer=answer,
            initial=str(start),
            last=str(start),
        )

    def _table(self, rng: Rng) -> list[int]:
        """Return a permutation of the states that moves some of them."""
        while True:
            table = rng.shuffled(range(STATES))
            if table != list(range(STATES)):
                return table
