"""Questions about documents as JRT (2407.05483) asks them: a window of text around the answer, and what to continue.

The tables of gated DeltaNet's line of papers are made this way. lm-eval's own `swde`, `fda` and `squad_completion` are
another protocol: whole documents, which lose their beginning if they are too long.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

CONTEXT = 2048  # tokens
GENERATED_TOKENS = 48
SUMMARY = "Summary of information above..."  # where SWDE's text begins to give the answer away

Row = Mapping[str, Any]


class Document(TypedDict):
    context: str
    answers: list[str]  # any of them is right
    question: str  # the end of the context, which an answer should not repeat


def documents(name: str, rows: Any, tokenizer: Any) -> list[Document]:
    """Return the documents of a data set of JRT, without those whose answer has fewer than two characters."""
    found = (document(name, row, tokenizer) for row in rows)
    return [doc for doc in found if doc is not None]


def document(name: str, row: Row, tokenizer: Any) -> Document | None:
    """Return the document of a row, or None if its first answer has fewer than two characters."""
    answers = list(row["answers"]) if "answers" in row else [row["value"]]
    if not answers or len(answers[0]) < 2:
        return None
    column = "text" if "text" in COLUMNS[name] else "context"
    text = row[column].split(SUMMARY)[0] if name == "swde" else row[column]
    window = window_of(text.strip(), answers, tokenizer, row.get("tok_pos"))
    context, question = PROMPTS[name](window, row)
    return Document(context=context, answers=answers, question=question)


def window_of(text: str, answers: list[str], tokenizer: Any, position: int | None = None) -> str:
    """Return the tokens around the first occurrence of an answer: half of the window before it, half after.

    As in JRT, a text that would fit also loses what is further from the answer than half the window, and a text
    without an answer is cut around `position` [tokens], or keeps its end.
    """
    size = CONTEXT - GENERATED_TOKENS

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    matches = (re.search(re.escape(answer), text, re.IGNORECASE) for answer in answers)
    match = next((match for match in matches if match), None)
    ids = encode(text)
    middle = len(encode(text[: match.start()] if match else text[:-1]))
    if match is None and position is not None and middle > size:
        middle = position
    start = max(0, middle - size // 2)
    return tokenizer.decode(ids[start : start + size], skip_special_tokens=True)


def contains(generated: str, answers: list[str]) -> bool:
    """Return whether the text contains one of the answers, whatever the case."""
    return any(answer.lower() in generated.lower() for answer in answers)


def _without(text: str, question: str) -> str:
    while question and text.lower().endswith(question.lower()):
        text = text[: -len(question)]
    return text


def _key(row: Row) -> str:
    return f"{row['key'][0].upper()}{row['key'][1:]}:"


def _swde(text: str, row: Row) -> tuple[str, str]:
    text = _without(text, f"{row['key']}:").strip("\n").strip().strip("\n").strip().strip(".")
    return f"{text}. {_key(row)}", _key(row)


def _fda(text: str, row: Row) -> tuple[str, str]:
    text = _without(text, f"{row['key']}:").strip("\n").strip(".")
    return f"{text}. {_key(row)}", _key(row)


def _squad(text: str, row: Row) -> tuple[str, str]:
    text = text.strip()
    return text, text.rsplit("\n", 1)[-1]


def _question(text: str, row: Row) -> tuple[str, str]:
    question = row["question"].strip()
    text = _without(text.strip(), question).strip().strip(".")
    return f"{text}. {question}", question


def _triviaqa(text: str, row: Row) -> tuple[str, str]:
    return _question(re.sub(r"\[PAR\]|\[DOC\]|\[TLE\]", "", text), row)


PROMPTS: dict[str, Callable[[str, Row], tuple[str, str]]] = {
    "swde": _swde,
    "fda": _fda,
    "squad": _squad,
    "triviaqa": _triviaqa,
    "nq": _question,
    "drop": _question,
}
COLUMNS = {
    **dict.fromkeys(("swde", "fda"), ("text", "key", "value")),
    "squad": ("text", "value"),
    **dict.fromkeys(("triviaqa", "nq", "drop"), ("context", "question", "answers")),
}
