"""State-based recall (arXiv 2604.03444, appendix C.1): a bit at an index that swaps of five variables move.

bits = [1, 0, 0, 1, 1, 0, 1, 0]
a, b, c, d, e = 6, 2, 5, 0, 3
a, c = c, a
b, c = c, b
assert bits[a] == 0
"""

from lrnn.traces.permutations import NAMES, assign, draw_moves
from lrnn.traces.program import Format, Program, Rng

DEGREE = len(NAMES)
FEWEST_BITS = 8  # five different indices, of both values


class Recall(Format):
    """Ask for the bit that `a` points to, of as many bits as there are swaps.

    `a` never points where it did at first, and nothing points to the last bit: these say nothing about the answer.
    """

    unit = "swaps"
    choices = ("0", "1")

    def draw(self, rng: Rng, length: int, answer: int) -> Program:
        while True:
            moves, origins = draw_moves(rng, DEGREE, 2, length)
            if origins[0] != 0:
                break
        bits = [rng.below(2) for _ in range(max(length, FEWEST_BITS))]
        indices = rng.shuffled(range(len(bits) - 1))[:DEGREE]
        bits[indices[origins[0]]] = answer
        return Program(
            start=f"bits = {bits}\n{assign(indices)}",
            changes=tuple(move.text for move in moves),
            question="assert bits[a] ==",
            answer=answer,
            initial=str(bits[indices[0]]),
            last=str(bits[-1]),
        )
