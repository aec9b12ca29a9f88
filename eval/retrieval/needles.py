"""Needles in a haystack: prompts of a given number of tokens that say something once and then ask for it.

The forms and the wording are those of RULER (2404.06654), but not its haystacks. Scores depend on the text, so figures
of one haystack are not to be compared with those of another. A document is made from its form, length and number alone.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from lrnn.errors import UserError
from lrnn.eval.retrieval.haystack import NOISE, sentences
from lrnn.eval.retrieval.words import pairs_of_words

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)  # tokens, of the prompt and what is generated
DOCUMENTS_PER_LENGTH = 120
DEPTHS = 40  # places of the asked needle, from the beginning of the text to its end
STRIDE = 17  # without a common divisor with DEPTHS: the first documents are spread over all depths
GENERATED_TOKENS = 128
SEED = 0

Count = Callable[[str], int]
Needle = tuple[str, str]  # key and value


@dataclass(frozen=True)
class Form:
    """What is hidden, and where.

    Attributes:
        haystack: "noise" (one line again and again), "text", or "needles" (more needles, about other keys).
        key: "words" or "uuids".
        value: "number" (of seven digits) or "uuid".
        needles: how many keys have a value in the text; one is asked for.
    """

    haystack: str
    key: str
    value: str
    needles: int = 1


FORMS = {
    "single_1": Form("noise", "words", "number"),
    "single_2": Form("text", "words", "number"),
    "single_3": Form("text", "words", "uuid"),
    "multikey_1": Form("text", "words", "number", needles=4),
    "multikey_2": Form("needles", "words", "number"),
    "multikey_3": Form("needles", "uuids", "uuid"),
}


class Document(TypedDict):
    context: str
    answer: str
    kind: str  # "number" or "uuid": what an answer looks like
    length: int  # tokens: at most these with the generated ones, and less than a sentence less
    third: int  # 0, 1 or 2: the part of the text that holds the needle


def documents(form: str, count: Count, max_length: int, file: str | None) -> list[Document]:
    """Return the documents of a form, alternating lengths and depths so that the first N are a fair subset.

    Args:
        form: a name in `FORMS`.
        count: returns the number of tokens of a text.
        max_length: tokens; longer documents are left out.
        file: the haystack's file, None for generated sentences.

    Raises:
        UserError: `max_length` is below the shortest length, or the file is no haystack.
    """
    lengths = [length for length in LENGTHS if length <= max_length]
    if not lengths:
        raise UserError(f"needles need a context of at least {LENGTHS[0]} tokens, not {max_length}: give --max-length")
    makers = [Maker(FORMS[form], form, length, count, file) for length in lengths]
    return [maker.document(number) for number in range(DOCUMENTS_PER_LENGTH) for maker in makers]


class Maker:
    """Make the documents of one form and length. The number of sentences of one document is a guess for the next."""

    def __init__(self, form: Form, name: str, length: int, count: Count, file: str | None) -> None:
        self.form, self.name, self.length, self.count = form, name, length, count
        self.capacity = length - GENERATED_TOKENS - 1  # 1 for bos
        self.text = sentences(file) if form.haystack == "text" else ()
        self.guess = self.capacity // 16

    def document(self, number: int) -> Document:
        depth = number * STRIDE % DEPTHS
        for attempt in range(100):
            rng = random.Random(f"{SEED}/{self.name}/{self.length}/{number}/{attempt}")
            asked, *others = [self._needle(rng) for _ in range(self.form.needles)]
            start, seed = rng.randrange(max(1, len(self.text))), rng.random()
            context = self._fill(partial(self._prompt, asked, others, depth, start, seed))
            key, value = asked
            # The key is in the needle, in the question and in the beginning of the answer.
            if context.count(value) == 1 and context.count(key) == 3:
                third, kind = min(3 * depth // DEPTHS, 2), self.form.value
                return Document(context=context, answer=value, kind=kind, length=self.length, third=third)
        raise UserError(f"the haystack holds all keys or values that were drawn for lrnn_needle_{self.name}")

    def _needle(self, rng: random.Random) -> Needle:
        def draw_uuid() -> str:
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))

        key = draw_uuid() if self.form.key == "uuids" else pairs_of_words(rng, 1)[0].replace(" ", "-")
        return key, draw_uuid() if self.form.value == "uuid" else str(rng.randrange(10**6, 10**7))

    def _units(self, n: int, start: int, seed: float) -> list[str]:
        """Return n sentences without the needles."""
        if self.form.haystack == "noise":
            return [NOISE] * n
        if self.form.haystack == "text":
            return [self.text[(start + i) % len(self.text)] for i in range(n)]
        rng = random.Random(f"{seed}")
        return [self._say(*self._needle(rng)) for _ in range(n)]

    def _say(self, key: str, value: str) -> str:
        return f"One of the special magic {self.form.value}s for {key} is: {value}."

    def _prompt(self, asked: Needle, others: list[Needle], depth: int, start: int, seed: float, n: int) -> str:
        """Return the prompt with n sentences, the asked needle at `depth` of `DEPTHS` - 1 and the others anywhere."""
        rng = random.Random(f"{seed}/others")
        depths = [depth, *(rng.randrange(DEPTHS) for _ in others)]
        units = self._units(n, start, seed)
        placed = [
            (round(n * d / (DEPTHS - 1)), self._say(*needle))
            for d, needle in zip(depths, [asked, *others], strict=True)
        ]
        for place, needle in sorted(placed, reverse=True):
            units.insert(place, needle)
        text = (" " if self.form.haystack == "text" else "\n").join(units)
        kind = self.form.value
        return (
            f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards.\n{text}\nWhat is the special magic {kind} for {asked[0]} mentioned in the "
            f"provided text? The special magic {kind} for {asked[0]} mentioned in the provided text is"
        )

    def _fill(self, prompt: Callable[[int], str]) -> str:
        """Return the prompt with as many sentences as fit."""
        best = prompt(0)
        used = empty = self.count(best)
        if empty > self.capacity:
            raise UserError(
                f"lrnn_needle_{self.name} has {empty} tokens without any text, more than fit into {self.length}"
            )
        low, high, n = 0, self.capacity + 1, self.guess  # a sentence has at least one token
        while low < n < high:
            text = prompt(n)
            tokens = self.count(text)
            each = max(1.0, (tokens - empty) / n)
            if tokens <= self.capacity:
                low, used, best = n, tokens, text
            else:
                high = n
            n = min(low + max(1, int((self.capacity - used) / each)), high - 1)
        self.guess = max(1, low)
        return best
