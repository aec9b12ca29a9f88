"""The answers that Python gives to programs that end in a question. They know nothing of how the programs are made."""

import ast
import re


def answer(question: str, choices: list[str]) -> str:
    """Return the choice with the value that Python computes."""
    (right,) = (choice for choice in choices if ast.literal_eval(choice) == value(question))
    return right


def value(question: str) -> object:
    """Return the value that a question asks for, by running the lines before it without most built-ins.

    What a session shows as printed has to be what is printed.
    """
    lines = question.rstrip("\n").split("\n")
    if not question.startswith(">>> "):
        names = {"__builtins__": {"len": len}}
        exec("\n".join(lines[:-1]), names)
        return eval(re.fullmatch(r"assert (.+) ==", lines[-1])[1], names)
    printed: list[int] = []
    source = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
    exec("\n".join(source), {"__builtins__": {"print": printed.append}})
    assert [line for line in lines if not line.startswith(">>> ")] == [str(number) for number in printed[:-1]]
    return printed[-1]


def split(question: str) -> tuple[list[str], list[str], str]:
    """Return the lines that set up the state, the state changes without what they print, and the question's line."""
    lines = question.rstrip("\n").split("\n")
    if question.startswith(">>> "):
        lines = [line for line in lines[:-1] if line.startswith(">>> ") and "print" not in line] + lines[-1:]
    number = next((n for start, n in (("bits = ", 2), ("x = [", 4)) if question.startswith(start)), 1)
    return lines[:number], lines[number:-1], lines[-1]


def last_literal(question: str) -> str:
    """Return the value that is written last: printed, assigned alone or pushed, or else at the start."""
    start, changes, _ = split(question)
    printed = re.findall(r"^\d$", question, re.MULTILINE)
    matches = (re.fullmatch(r"(?:\w = |stack\.append\()(\d|\"[^\"]\")\)?", line) for line in changes)
    written = printed or [match[1] for match in matches if match]
    return written[-1] if written else re.findall(r"\d", start[0] if start[0].startswith("bits") else start[-1])[-1]
