"""Associative recall in text: a list of keys and values, some keys asked and answered, and one asked.

It is multi-query associative recall (2312.04927) for a language model: the list is read once, and every key after it
has to be looked up. Three keys are answered first, so that a model need not be told what is asked for.
"""

import random
from typing import TypedDict

from lrnn.errors import UserError
from lrnn.eval.retrieval.needles import Count
from lrnn.eval.retrieval.words import pairs_of_words

PAIRS = (4, 8, 16, 32, 64, 128, 256)
DOCUMENTS_PER_SIZE = 120
ANSWERED = 3  # keys that are asked and answered before the one that counts
GENERATED_TOKENS = 16
STRIDE = 17  # without a common divisor with any size: the first documents are spread over the list
SEED = 0


class Document(TypedDict):
    context: str
    answers: list[str]  # one
    values: list[str]  # of all keys
    length: int  # pairs in the list
    third: int  # 0, 1 or 2: the part of the list that holds the asked key


def documents(count: Count, max_length: int) -> list[Document]:
    """Return the documents, alternating sizes and places so that the first N are a fair subset.

    Args:
        count: returns the number of tokens of a text.
        max_length: tokens; sizes with a longer document are left out.

    Raises:
        UserError: no size fits.
    """
    sizes = []
    for size in PAIRS:
        found = [document(size, number) for number in range(DOCUMENTS_PER_SIZE)]
        if max(count(doc["context"]) for doc in found) + GENERATED_TOKENS + 1 <= max_length:  # 1 for bos
            sizes.append(found)
    if not sizes:
        raise UserError(
            f"a list of {PAIRS[0]} keys and values does not fit into {max_length} tokens: give --max-length"
        )
    return [doc for row in zip(*sizes, strict=True) for doc in row]


def document(size: int, number: int) -> Document:
    """Return a document of `size` pairs."""
    rng = random.Random(f"{SEED}/pairs/{size}/{number}")
    keys = pairs_of_words(rng, size)
    values = [str(value) for value in rng.sample(range(1000, 10000), size)]
    place = number * STRIDE % size
    before = rng.sample([i for i in range(size) if i != place], ANSWERED)
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    context = "\n".join([*lines, "", *(lines[i] for i in before), f"{keys[place]}:"])
    third = min(3 * place // size, 2)
    return Document(context=context, answers=[values[place]], values=values, length=size, third=third)
