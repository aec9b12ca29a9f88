"""The sentences that needles are hidden among: those of a file, or generated ones."""

import random
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lrnn.errors import UserError
from lrnn.eval.documents import read_texts
from lrnn.eval.retrieval.words import sentence

GENERATED = 4096  # sentences
MIN_SENTENCES = 20
MAX_CHARACTERS = 400  # of a sentence; longer ones are tables or code
ENOUGH = 2**22  # characters: several times the longest prompt
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@cache
def sentences(file: str | None) -> tuple[str, ...]:
    """Return the sentences of a file, or generated ones for None.

    A file whose first line is a JSON object holds rows {"text": ...}; any other file is plain text.

    Raises:
        UserError: the file is missing, is not text, has a bad row, or holds fewer than 20 sentences.
    """
    if file is None:
        rng = random.Random("haystack")
        return tuple(sentence(rng) for _ in range(GENERATED))
    path = Path(file)
    if not path.is_file():
        raise UserError(f"haystack file not found: {path}")
    found: list[str] = []
    characters = 0
    for text in _texts(path):
        parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text))
        kept = [part for part in parts if part.endswith((".", "!", "?")) and len(part) <= MAX_CHARACTERS]
        found += kept
        characters += sum(map(len, kept))
        if characters > ENOUGH:
            break
    if len(found) < MIN_SENTENCES:
        raise UserError(
            f"{path} has {len(found)} sentences of at most {MAX_CHARACTERS} characters; a haystack needs at least "
            f"{MIN_SENTENCES}"
        )
    return tuple(found)


def _texts(path: Path) -> Iterable[str]:
    with path.open("rb") as file:
        rows = file.readline().lstrip().startswith(b"{")
    if rows:
        return (text for _, text in read_texts(path))
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
