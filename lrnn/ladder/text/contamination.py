"""Find documents that share 13 words in a row with HumanEval, MBPP, GSM8K or MATH."""

import json
from itertools import repeat
from pathlib import Path

import numpy as np

from lrnn.errors import UserError

WORDS = 13
# Rows of these files, as `lrnn eval --fetch` writes them, and the columns that hold questions and solutions.
BENCHMARKS = {
    "humaneval": ("prompt", "canonical_solution"),
    "mbpp": ("text", "code"),
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
}
LEAST_DISTINCT = 5  # distinct words with letters in a run of words that counts: lists of numbers are no question
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(WORDS)], dtype=np.uint64)
_WORDS_ALONE = bytes(  # lower case, and a space for every byte between words
    ord(chr(byte).lower()) if byte < 128 and (chr(byte).isalnum() or byte == ord("_")) else byte if byte > 127 else 32
    for byte in range(256)
)


def words(text: str) -> list[bytes]:
    """Return the words of a text in lower case, as UTF-8: runs of letters, digits, underscores and all but ASCII."""
    return text.encode().translate(_WORDS_ALONE).split()


class Benchmarks:
    """All runs of 13 words in the questions and solutions of the benchmarks.

    Args:
        folder: the folder of the data; see `lrnn eval --fetch`.

    Raises:
        UserError: a file is missing.
    """

    def __init__(self, folder: Path):
        self._numbers: dict[bytes, int] = {}  # words that benchmarks use, from 1; 0 is any other word
        runs = []
        for text in _texts(folder):
            found = words(text)
            ids = np.array([self._numbers.setdefault(w, len(self._numbers) + 1) for w in found], dtype=np.uint64)
            starts = [
                i
                for i in range(len(found) - WORDS + 1)
                if len({w for w in found[i : i + WORDS] if not w.isdigit()}) >= LEAST_DISTINCT
            ]
            if starts:
                runs.append(_hashes(ids[np.array(starts)[:, None] + np.arange(WORDS)]))
        self._runs = np.unique(np.concatenate(runs)) if runs else np.empty(0, dtype=np.uint64)

    def share_words(self, text: str) -> bool:
        """Return whether a text holds 13 words in a row of a benchmark."""
        found = words(text)
        ids = np.fromiter(map(self._numbers.get, found, repeat(0)), dtype=np.uint64, count=len(found))
        if len(ids) < WORDS:
            return False
        known = np.cumsum(ids != 0)
        starts = np.flatnonzero(known[WORDS - 1 :] - known[: 1 - WORDS] == WORDS - 1)
        starts = starts[ids[starts] != 0]
        if len(starts) == 0 or len(self._runs) == 0:
            return False
        hashes = _hashes(ids[starts[:, None] + np.arange(WORDS)])
        places = np.minimum(np.searchsorted(self._runs, hashes), len(self._runs) - 1)
        return bool((self._runs[places] == hashes).any())


def _hashes(runs: np.ndarray) -> np.ndarray:
    """Return a hash of every row of ids: [n, 13] -> [n], uint64."""
    mixed = runs * np.uint64(0xD6E8FEB86659FD93)
    return ((mixed ^ (mixed >> np.uint64(32))) * _POWERS).sum(axis=1, dtype=np.uint64)


def _texts(folder: Path) -> list[str]:
    texts = []
    for name, columns in BENCHMARKS.items():
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is missing; `lrnn eval --fetch` writes it, or name its folder with --benchmarks")
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            texts += [row[column] for column in columns]
    return texts
