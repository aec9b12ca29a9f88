"""Find registers of asynchronous products (wgmma) that PTX uses before the products are waited for."""

import re

_PRODUCT = re.compile(r"wgmma\.mma_async\S* \{([^}]*)\}, (?:\{([^}]*)\}, )?")
_REGISTER = re.compile(r"%\w+")
_NO_RESULT = ("st.", "red.", "bar.", "mbarrier.", "cp.", "fence", "bra", "ret", "prefetch", "stmatrix", "barrier.")


def find_hazards(ptx: str) -> list[str]:
    """Find instructions that write an operand, or read or write an accumulator, of a product under way.

    PTX leaves their outcome undefined (ISA, `wgmma.wait_group`). Every path through the branches is followed, also
    around loops. A register is free once a wait leaves no more groups pending than were committed after its own. If
    paths meet, the one on which a register has been in use for the fewest groups counts. Indirect branches, by which
    the warps of Gluon's parts find their own code, are not followed, because nothing is under way there.

    Returns:
        The line and the register of each such instruction.

    Raises:
        ValueError: If a product is written in an unknown way.
    """
    blocks, labels = _blocks(ptx)
    entered: list[dict[str, tuple[int, bool]]] = [{} for _ in blocks]
    todo, found = [*range(len(blocks))], {}
    while todo:
        number = todo.pop()
        used = dict(entered[number])  # register: (groups committed after its own, or -1 before its own; is accumulator)
        followers = [number + 1]
        for line in blocks[number]:
            if product := _PRODUCT.search(line):
                used |= {r: (-1, True) for r in _REGISTER.findall(product[1])}
                used |= {r: (-1, False) for r in _REGISTER.findall(product[2] or "")}
            elif "wgmma.mma_async" in line:
                raise ValueError(f"a product whose registers are not understood: {line}")
            elif "wgmma.commit_group" in line:
                used = {r: (age + 1, acc) for r, (age, acc) in used.items()}
            elif wait := re.search(r"wgmma\.wait_group\S* (\d+)", line):
                used = {r: (age, acc) for r, (age, acc) in used.items() if age < int(wait[1])}
            elif "wgmma." not in line and used:
                for register in _touched(line, used):
                    found[line, register] = f"{line}  [{register}]"
            if branch := re.search(r"^(@\S+\s+)?bra\S*\s+(\$\w+)", line):
                followers = [labels[branch[2]]] + ([number + 1] if branch[1] else [])
            elif re.match(r"ret;|exit;", line):
                followers = []
        for follower in followers:
            if follower < len(blocks):
                met = dict(entered[follower])
                for r, (age, acc) in used.items():
                    met[r] = (min(age, met[r][0]), acc) if r in met else (age, acc)
                if met != entered[follower]:
                    entered[follower] = met
                    todo.append(follower)
    return list(found.values())


def _blocks(ptx: str) -> tuple[list[list[str]], dict[str, int]]:
    blocks: list[list[str]] = [[]]
    labels = {}
    for line in ptx.splitlines():
        line = line.split("//")[0].strip()
        if not line or line.startswith((".", "{", "}")):
            continue
        if label := re.match(r"([$\w]+):", line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
            line = line[label.end() :].strip()
        if line:
            blocks[-1].append(line)
            if re.match(r"(@\S+\s+)?bra", line) or re.match(r"ret;|exit;", line):
                blocks.append([])
    return blocks, labels


def _touched(line: str, used: dict[str, tuple[int, bool]]) -> list[str]:
    body = re.sub(r"^@!?%\w+\s+", "", line)
    operands = " ".join(body.split()[1:])
    results = _REGISTER.findall(operands.split("}" if operands.startswith("{") else ",")[0])
    written = set() if body.startswith(_NO_RESULT) else set(results)
    return [r for r in set(_REGISTER.findall(operands)) & used.keys() if used[r][1] or r in written]
