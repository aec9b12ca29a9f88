"""Slow solvers of the state-tracking questions. They read only the text and return (answer, length) of a question."""

import re


def parity(question):
    (bits,) = re.fullmatch(r"Bits: ([01 ]+)\nThe number of ones is", question).groups()
    return ("even", "odd")[bits.count("1") % 2], len(bits.split())


def even_pairs(question):
    (letters,) = re.fullmatch(
        r"Letters: ([ab ]+)\nThe number of changes from one letter to the next is", question
    ).groups()
    word = letters.replace(" ", "")
    return ("even", "odd")[(word.count("ab") + word.count("ba")) % 2], len(word)


def cycle_navigation(question):
    (moves,) = re.fullmatch(r"A ring of rooms 0 1 2 3 4, from room 0: ([a-z ]+)\nNow in room", question).groups()
    rooms = [0, 1, 2, 3, 4]
    for move in moves.split():
        rooms = {"stay": rooms, "forward": rooms[1:] + rooms[:1], "back": rooms[-1:] + rooms[:-1]}[move]
    return str(rooms[0]), len(moves.split())


def python(question):
    """Return the value that the last comparison expects, by running the text without built-ins."""
    *lines, last = question.split("\n")
    names = {}
    assert set(re.findall(r"[a-z]+", question)) <= {"x", "assert"}
    exec("\n".join(lines), {"__builtins__": {}}, names)
    return str(eval(re.fullmatch(r"assert (.+) ==", last)[1], {"__builtins__": {}}, names))


def plain_arithmetic(question):
    assert re.fullmatch(r"assert \(\d( [-+*] \d)*\) % 5 ==", question)
    return python(question), len(re.findall(r"\d", question)) - 1


def bracket_arithmetic(question):
    return python(question), len(question.removeprefix("assert").removesuffix("% 5 ==").replace(" ", ""))


def program(question):
    return python(question), question.count("\n") - 1


def cups(question):
    setting, asked = question.split("\n")
    first, *moves = setting.removesuffix(".").split(". ")
    names, colours = re.fullmatch(r"Cups ([A-E ]+) hold balls ([a-z ]+)", first).groups()
    balls = dict(zip(names.split(), colours.split(), strict=True))
    for move in moves:
        if swap := re.fullmatch(r"Swap (\w) and (\w)", move):
            balls[swap[1]], balls[swap[2]] = balls[swap[2]], balls[swap[1]]
        elif move != "Swap nothing":
            source, target = (part.split() for part in re.fullmatch(r"Move ([A-E ]+) to ([A-E ]+)", move).groups())
            balls = {new: balls[old] for old, new in zip(source, target, strict=True)}
    (colour,) = re.fullmatch(r"The (\w+) ball is in cup", asked).groups()
    (cup,) = (cup for cup, ball in balls.items() if ball == colour)
    return cup, len(moves)


SOLVERS = {
    "parity": parity,
    "even_pairs": even_pairs,
    "cycle_navigation": cycle_navigation,
    "modular_arithmetic": plain_arithmetic,
    "modular_arithmetic_brackets": bracket_arithmetic,
    "s3": cups,
    "s3_swaps": cups,
    "s5": cups,
    "s5_swaps": cups,
    "program": program,
}


def solve(name, prompt):
    """Return (answer, length) of the last question of a prompt."""
    return SOLVERS[name](prompt.split("\n\n")[-1])
