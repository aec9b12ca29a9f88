"""Jump ahead in PyTorch's random numbers on the CPU, without drawing those in between.

They come from a Mersenne Twister: 624 words of 32 bits, from which the next word follows by a recurrence that is linear
over GF(2). Its characteristic polynomial phi has degree 19937 (Matsumoto and Nishimura 1998, appendix A). So with

    x^n mod phi = sum over j in J of x^j,    word[i + n] = xor over j in J of word[i + j].

A polynomial is a Python integer here, whose bit j is the coefficient of x^j.
"""

import functools

import numpy as np
import torch
from torch import Tensor

WORDS, MIDDLE, LOWER, TWIST = 624, 397, 31, 0x9908B0DF  # n, m, r and a of the paper, for words of 32 bits
DEGREE = 19937
FEW = 2**24  # numbers that are drawn faster than jumped over
AT_ONCE = 256  # windows of words that are combined in one call, so that they fit into the processor's cache

# What `torch.Generator.get_state()` returns. After `left` - 1 more numbers the words are replaced.
STATE = np.dtype(
    [("seed", "u8"), ("left", "i4"), ("seeded", "i4"), ("next", "u8"), ("words", "u8", (WORDS,)), ("rest", "V40")]
)


def advance(state: Tensor, count: int) -> Tensor:
    """Return the state of a CPU generator after `count` more numbers of 32 bits.

    Args:
        state: what `torch.Generator.get_state` returned.
        count: number of draws. `uniform_` takes one for each float32.
    """
    fields = np.frombuffer(state.numpy().tobytes(), STATE).copy()  # which refuses another size
    twister = np.random.MT19937()
    position = WORDS + 1 - int(fields["left"][0])
    _set(twister, fields["words"][0].astype(np.uint32), position)
    if count > FEW:
        count -= _renew(twister, position)
        words = _combine(_following(twister, DEGREE + WORDS), _power_of_x(count - count % WORDS))
        _set(twister, words, 1 + count % WORDS)
    elif count:
        twister.random_raw(count, output=False)
    after = twister.state["state"]
    fields["words"][0], fields["next"] = after["key"], after["pos"]
    fields["left"] = WORDS + 1 - after["pos"]
    return torch.frombuffer(bytearray(fields.tobytes()), dtype=torch.uint8)


def _set(twister: np.random.MT19937, words: np.ndarray, position: int) -> None:
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": position}}


def _renew(twister: np.random.MT19937, position: int) -> int:
    """Draw until the first of the next words is drawn. Return the number of draws."""
    count = WORDS + 1 - position
    twister.random_raw(count, output=False)
    return count


def _following(twister: np.random.MT19937, count: int) -> np.ndarray:
    """Return the twister's words and those that follow, `count` in all. The first of its words has been drawn."""
    parts = []
    for _ in range(-(-count // WORDS)):
        parts.append(twister.state["state"]["key"])
        _renew(twister, 1)
    return np.concatenate(parts)[:count]


def _combine(words: np.ndarray, polynomial: int) -> np.ndarray:
    """Return xor over the terms x^j of words[j], ..., words[j + 623]."""
    bits = np.unpackbits(np.frombuffer(polynomial.to_bytes(DEGREE // 8 + 1, "little"), np.uint8), bitorder="little")
    windows = np.lib.stride_tricks.sliding_window_view(words, WORDS)
    total = np.zeros(WORDS, np.uint32)
    (terms,) = bits.nonzero()
    for i in range(0, len(terms), AT_ONCE):
        total ^= np.bitwise_xor.reduce(windows[terms[i : i + AT_ONCE]])
    return total


@functools.cache
def _power_of_x(n: int) -> int:
    """Return x^n mod phi."""
    power = 1
    for digit in f"{n:b}":
        power = int(f"{power:b}", 4)  # its square: every bit moves to twice its place
        power = _reduce(power << 1 if digit == "1" else power)
    return power


def _reduce(polynomial: int) -> int:
    """Return a polynomial mod phi."""
    while high := polynomial >> DEGREE:
        polynomial &= (1 << DEGREE) - 1
        for j in _lower_terms():
            polynomial ^= high << j
    return polynomial


@functools.cache
def _lower_terms() -> list[int]:
    """Return j of the terms x^j of phi - x^19937.

    With u = x^n + x^m, v = x^(n-1) + x^(m-1) and the bits a_i of a, phi is
    u (v^31 + sum over i < 31 of a_i v^(30-i)) + a_31.
    """
    inner, power = 0, 1
    for i in reversed(range(LOWER)):
        inner ^= power * (TWIST >> i & 1)
        power = power << (WORDS - 1) ^ power << (MIDDLE - 1)
    inner ^= power
    phi = inner << WORDS ^ inner << MIDDLE ^ TWIST >> LOWER
    assert phi.bit_length() == DEGREE + 1
    return [j for j in range(DEGREE) if phi >> j & 1]
