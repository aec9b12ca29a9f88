"""Test who may import whom: kernels, traces < model < formats < pretrain < track, bench < eval < ladder; no circles.

All of them may import the floor: files, settings and others that know nothing of any room. Imports inside functions
count; those under TYPE_CHECKING do not.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LEVELS = {  # a room imports rooms of lower levels, and itself
    "lrnn.floor": 0,
    "lrnn.kernels": 1,
    "lrnn.traces": 1,
    "lrnn.model": 2,
    "lrnn.package": 3,  # they register the model and read its description
    "lrnn.formats": 4,
    "lrnn.pretrain": 5,
    "lrnn.track": 6,
    "lrnn.bench": 6,
    "lrnn.eval": 7,
    "lrnn.ladder": 8,
    "lrnn.commands": 9,
}
FLOOR = {"environment", "errors", "files", "parsing", "paths", "records", "run_lock", "settings", "shipped", "threads"}
FLOOR |= {"container", "sbatch", "sentencepiece_bpe", "tokenizer", "tokenizer_export"}
PACKAGE = {"__init__", "auto_classes", "model_config"}
# These name or run everything.
COMMANDS = {"cli", "config_schema", "completion", "init", "pretraining", "quickstart", "show_config", "submit"}
CLASSES = "lrnn.model.modeling_lrnn"  # where `from lrnn import LrnnForCausalLM` leads
MAX_LINES = 500


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its name. The rooms at the top of the repository are those in lrnn/."""
    found = {f"lrnn.{path.stem}".removesuffix(".__init__"): path for path in (REPOSITORY / "lrnn").glob("*.py")}
    for room, folder in (("kernels", "kernels"), ("pretrain", "pretrain"), ("eval", "eval")):
        found |= _modules_of(f"lrnn.{room}", REPOSITORY / folder)
    for room in ("formats", "model", "traces", "track", "bench", "ladder"):
        found |= _modules_of(f"lrnn.{room}", REPOSITORY / "lrnn" / room)
    return found


def _modules_of(package: str, folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        names[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return names


def room_of(module: str) -> str:
    first = module.split(".")[1] if "." in module else "__init__"
    if first in FLOOR | PACKAGE | COMMANDS:
        return "lrnn.floor" if first in FLOOR else "lrnn.package" if first in PACKAGE else "lrnn.commands"
    return f"lrnn.{first}"


def imports(module: str, path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield each module of lrnn that a module imports, the line, and whether this happens at its own import."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    if alias.name.split(".")[0] == "lrnn":
                        yield alias.name, child.lineno, at_once
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    base = ".".join([*package.split(".")[: len(package.split(".")) - child.level + 1], base]).strip(".")
                if base.split(".")[0] == "lrnn":
                    for alias in child.names:
                        name = CLASSES if base == "lrnn" and alias.name.startswith("Lrnn") else f"{base}.{alias.name}"
                        yield (name if name in modules() else base), child.lineno, at_once
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_once and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(REPOSITORY)}:{line}"


def test_imports_are_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import os, lrnn.files\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lrnn.eval.export import write\n"
        "from lrnn import LrnnConfig, cli\n"
        "from .layers import Mixer\n"
        "try:\n    from lrnn.kernels import recurrences\nexcept ImportError:\n    pass\n"
        "def later():\n    from lrnn.pretrain.config import Config\n"
    )
    assert list(imports("lrnn.model.module", path)) == [
        ("lrnn.files", 1, True),
        (CLASSES, 5, True),
        ("lrnn.cli", 5, True),
        ("lrnn.model.layers", 6, True),
        ("lrnn.kernels.recurrences", 8, True),
        ("lrnn.pretrain.config", 12, False),
    ]
    assert len(modules()) > 100 and {"lrnn", "lrnn.kernels.delta_rule.api", CLASSES} <= modules().keys()


def test_every_module_belongs_to_a_room():
    unplaced = {name: path for name, path in modules().items() if room_of(name) not in LEVELS}
    assert not unplaced, f"say in tests/lrnn/test_imports.py what may import {sorted(unplaced)}"


def test_imports_only_lower_levels():
    upward = []
    for name, path in modules().items():
        room = room_of(name)
        for other, line, _ in imports(name, path):
            target = room_of(other)
            # `import lrnn` alone loads nothing. Other names are files beside the importing one in exported folders.
            if other == "lrnn" or other not in modules():
                continue
            if target != room and LEVELS[target] >= LEVELS[room]:
                upward.append(f"{place(path, line)}: {room} imports {other} of {target}")
    assert not upward, "imports upward or sideways:\n" + "\n".join(upward)


def test_modules_do_not_import_in_circles():
    graph = {
        name: {other for other, _, at_once in imports(name, path) if at_once and other in modules()}
        for name, path in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "circle of imports: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {"lrnn"}):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_starting_the_processes_of_a_run_imports_no_model():
    """It takes as long as the imports of the processes that are started, which begin after it."""
    seen, waiting = set(), ["lrnn.pretraining"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        found = {other for other, _, at_once in imports(name, modules()[name]) if at_once} & modules().keys()
        waiting += found - seen - {CLASSES}  # `from lrnn import LrnnConfig` does not import the classes of models
    assert {"lrnn.pretrain.config", "lrnn.pretrain.launch"} <= seen
    assert not seen & {"lrnn.pretrain.run", "lrnn.pretrain.engine", "lrnn.pretrain.distributed", "lrnn.model.layers"}


def test_init_files_hold_a_docstring_only():
    """`lrnn` and `lrnn.pretrain.corpus` also give public classes, loaded when they are asked for."""
    for name, path in modules().items():
        if path.name == "__init__.py" and name not in ("lrnn", "lrnn.pretrain.corpus"):
            body = ast.parse(path.read_text()).body
            only = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            assert only, f"{path.relative_to(REPOSITORY)} should hold its docstring and nothing else"


def test_no_file_is_long():
    files = [*modules().values(), *(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "docs").rglob("*.py")]
    long = {str(f.relative_to(REPOSITORY)): n for f in files if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def test_names_of_0_1_0_still_import():
    from lrnn.pretrain.corpus import TokenCorpus
    from lrnn.pretrain.corpus.reader import TokenCorpus as same

    assert TokenCorpus is same
    with pytest.warns(DeprecationWarning, match=r"is now lrnn\.tokenizer"):
        from lrnn.pretrain.tokenizers_io import load_tokenizer
    with pytest.warns(DeprecationWarning, match=r"is now lrnn\.eval\.export\.tokenizer"):
        from lrnn.eval.tokenizer import export_tokenizer
    assert load_tokenizer.__module__ == "lrnn.tokenizer"
    assert export_tokenizer.__module__ == "lrnn.eval.export.tokenizer"
