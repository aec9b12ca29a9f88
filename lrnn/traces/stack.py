"""A stack of brackets: its depth, and the bracket on its top, after many pushes and pops.

    stack = ["(", "["]
    stack.append("{")
    stack.pop()
    stack[-1] = "("
    assert len(stack) == 2

There is no greatest depth, so that the answer depends on the whole program: a walk that turns at a greatest depth would
be known from its last lines.
"""

from lrnn.traces.program import Format, Program, Rng

BRACKETS = ('"("', '"["', '"{"')


def folded_walk(rng: Rng, start: int, stop: int, length: int, stays: int) -> list[int]:
    """Return the steps (-1, 0 or 1, `stays` of them 0) of a walk from `start` to `stop` that is never below 0.

    A walk on all integers is reflected at 0.
    """
    moves = length - stays
    ups = (moves + stop - start) // 2
    steps, place = [], start
    for step in rng.shuffled([1] * ups + [-1] * (moves - ups) + [0] * stays):
        steps.append(abs(place + step) - abs(place))
        place += step
    return steps


def statement(rng: Rng, step: int) -> str:
    """Return a line that changes the depth by `step`."""
    if step < 0:
        return "stack.pop()"
    bracket = rng.choice(BRACKETS)
    return f"stack.append({bracket})" if step else f"stack[-1] = {bracket}"


class Depth(Format):
    """Ask for the depth, which is 1 to 5 at the start and at the end."""

    unit = "lines"
    choices = ("1", "2", "3", "4", "5")

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        start = rng.below(len(self.choices))  # what is above the lowest bracket, which is never popped
        while True:
            stays = sum(rng.below(3) == 0 for _ in range(length))
            spare = length - stays - abs(answer - start)
            if spare >= 0 and spare % 2 == 0:
                break
        steps = folded_walk(rng, start, answer, length, stays)
        return Program(
            start=f"stack = [{', '.join(rng.choice(BRACKETS) for _ in range(start + 1))}]",
            changes=tuple(statement(rng, step) for step in steps),
            question="assert len(stack) ==",
            answer=answer,
            initial=self.choices[start],
            last=None,
        )


class Top(Format):
    """Ask for the bracket on the top. It was pushed anywhere in the program; what was pushed later is popped again."""

    unit = "lines"
    choices = BRACKETS

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        above = 2 * (1 + rng.below((length - 1) // 2))  # lines after the push that is asked for
        steps, depth = [], 0
        for _ in range(length - above - 1):
            step = 1 if depth == 0 or rng.below(2) else -1
            steps.append(step)
            depth += step
        before = [statement(rng, step) for step in steps]
        after = [statement(rng, step) for step in folded_walk(rng, 0, 0, above, 0)]
        start = [rng.choice(BRACKETS) for _ in range(3 + rng.below(3))]
        pushed = [line.removeprefix("stack.append(").removesuffix(")") for line in after if line.startswith("stack.a")]
        return Program(
            start=f"stack = [{', '.join(start)}]",
            changes=(*before, f"stack.append({self.choices[answer]})", *after),
            question="assert stack[-1] ==",
            answer=answer,
            initial=start[-1],
            last=pushed[-1],
        )
