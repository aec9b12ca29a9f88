"""Prompts, answers and scores of single documents, from the samples that lm-eval records."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PER_TASK = 20  # documents of each task
LONGEST = 4000  # characters of a text that are shown; the middle of a longer one is left out
NOT_SCORES = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}


@dataclass(frozen=True)
class Sample:
    """What a page shows of a document: texts are untrusted, so the template escapes them."""

    number: int
    prompt: str
    target: str
    answer: str
    scores: str


def read_samples(folder: Path) -> dict[str, list[Sample]]:
    """Return the first documents of each task of a result folder, by task."""
    found = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        samples: list[Sample] = []
        with path.open(encoding="utf-8") as file:
            for line in file:
                samples.append(_sample(json.loads(line)))
                if len(samples) == PER_TASK:
                    break
        found[path.stem.removeprefix("samples_")] = samples
    return found


def _sample(raw: dict[str, Any]) -> Sample:
    arguments = raw.get("arguments") or {}
    first = next(iter(arguments.values()), {}) if isinstance(arguments, dict) else dict(enumerate(arguments[0]))
    prompt = next(iter(first.values()), "") if isinstance(first, dict) else first
    scores = {key: value for key, value in raw.items() if _is_score(key, value)}
    return Sample(
        number=raw["doc_id"],
        prompt=shorten(str(prompt)),
        target=shorten(str(raw.get("target", ""))),
        answer=shorten("\n".join(_flat(raw.get("filtered_resps", raw.get("resps", []))))),
        scores=", ".join(f"{key} {value:.4g}" for key, value in scores.items()),
    )


def _is_score(key: str, value: Any) -> bool:
    return key not in NOT_SCORES and isinstance(value, int | float)


def _flat(value: Any) -> list[str]:
    """Return the texts and numbers in nested lists."""
    if isinstance(value, list | tuple):
        return [text for part in value for text in _flat(part)]
    return [f"{value:.4f}" if isinstance(value, float) else str(value)]


def shorten(text: str) -> str:
    """Return a text of at most 4,000 characters, with its beginning and its end."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - LONGEST:,} characters ...]\n{text[-half:]}"
