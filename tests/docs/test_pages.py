"""Test that the pages name what exists: `lrnn` commands with their options and keys, paths, folders of results."""

import re
import shlex
from pathlib import Path

import pytest

from lrnn import cli
from lrnn.ladder.cells import load_ladder
from lrnn.pretrain.config import load_config
from lrnn.track.grid import load_grid

REPOSITORY = Path(__file__).parents[2]
GUIDES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [*GUIDES, *sorted((REPOSITORY / "docs" / "results").glob("*.md"))]
SCHEMAS = {"pretrain": load_config, "submit": load_config, "track": load_grid, "ladder": load_ladder}
TOP = {path.name for path in REPOSITORY.iterdir()} - {"build", "runs"}  # these two are written by commands
# A path below a top-level folder, such as `kernels/delta_rule/api.py`; * and {a,b} are expanded.
PATH = re.compile(r"`([\w.-]+(?:/[\w.*{},-]+)+/?)`")


def commands(page: Path) -> list[str]:
    """Return the `lrnn` commands of a page's bash blocks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^lrnn .*", "".join(blocks), re.MULTILINE)


def paths(text: str) -> set[str]:
    """Return what a page names in backticks below a top-level folder, without words in capitals that stand for any."""
    found = {path for path in PATH.findall(text) if path.split("/")[0] in TOP}
    return {path for path in found if not re.search(r"(^|[/_])[A-Z]{2,}(\.|_|/|$)", path)}


def expanded(path: str) -> list[str]:
    """Return the paths that braces stand for."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return [path]
    before, after = path[: braces.start()], path[braces.end() :]
    return [one for choice in braces[1].split(",") for one in expanded(before + choice + after)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_are_accepted(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        args, _ = cli.parse(words)
        assert args.command == words[0], command
        # The file must exist, and its schema must have the keys that are changed.
        if args.command in SCHEMAS and not getattr(args, "eval", None):
            SCHEMAS[args.command](args.config, args.overrides)


def test_the_guides_have_commands():
    found = {command.split()[1] for page in PAGES for command in commands(page)}
    assert found >= {"corpus", "pretrain", "submit", "export", "eval", "track", "ladder", "position", "bench"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_paths_exist(page):
    missing = [
        path
        for named in sorted(paths(page.read_text(encoding="utf-8")))
        for path in expanded(named)
        if not any(REPOSITORY.glob(path.rstrip("/")))
    ]
    assert not missing


def test_paths_are_found_in_a_text():
    text = "`kernels/delta_rule/api.py`, `kernels/{common,nowhere}`, `lrnn/model/mixer_NAME.py`, `optim.lr`, `runs/x`"
    assert paths(text) == {"kernels/delta_rule/api.py", "kernels/{common,nowhere}"}
    assert expanded("kernels/{common,nowhere}") == ["kernels/common", "kernels/nowhere"]
    assert not any(REPOSITORY.glob("kernels/nowhere"))


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "results"], ids=lambda page: page.name)
def test_folders_of_results_exist(page):
    named = set(re.findall(r"`(\w+_(?:cpu|h100|h200))/`", page.read_text(encoding="utf-8")))
    assert all((page.parent / folder).is_dir() for folder in named), named


def test_every_folder_of_results_is_named_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    folders = [path.name for path in (REPOSITORY / "docs" / "results").iterdir() if path.is_dir()]
    assert folders and all(f"{folder}/" in text for folder in folders)
