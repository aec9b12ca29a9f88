"""The files that come with lrnn: configurations that have names, batch scripts, and pages of the documentation.

In a checkout, `configs` and `slurm` beside this file are links to the top-level folders. An installed package has the
folders themselves, and the pages too.
"""

from pathlib import Path

from lrnn.errors import UserError
from lrnn.files import expand

PACKAGE = Path(__file__).parent
RUNS = PACKAGE / "configs"
MODELS, GRIDS, LADDERS = RUNS / "models", RUNS / "track", RUNS / "ladder"
BATCH_SCRIPTS = PACKAGE / "slurm"


def names(folder: Path | None) -> list[str]:
    """Return the names of the configurations in a folder such as `RUNS`, sorted; none if there is no folder."""
    if folder is None:
        return []
    return sorted(path.stem for path in folder.iterdir() if path.suffix in (".yaml", ".json"))


def find(given: str | Path, folder: Path | None, what: str) -> Path:
    """Return the file of a configuration: `given` itself if it is a file, otherwise the shipped one of that name.

    Args:
        given: path of a file, or a name such as `340m`.
        folder: `RUNS`, `MODELS`, `GRIDS` or `LADDERS`, or None.
        what: the kind of file, as the first words of a message.

    Raises:
        UserError: there is neither.
    """
    from lrnn.settings import name_hint  # here, because it imports pydantic, which `lrnn --version` does without

    path = Path(expand(str(given), what))
    if path.is_file():
        return path
    known = names(folder)
    if folder is not None and str(given) in known:
        return next(folder.glob(f"{given}.*"))
    if path.is_dir():
        raise UserError(f"{what} {given} is a folder; give a file, or the name of one that comes with lrnn")
    raise UserError(
        f"{what} {given} does not exist; give the path of a file, or the name of one that comes with lrnn: "
        f"{name_hint(path.stem, known, list_all=True)}"
    )


def is_shipped(path: Path) -> bool:
    """Return whether a file is one of the configurations that come with lrnn."""
    return path.resolve().is_relative_to(RUNS.resolve())


def docs() -> Path:
    """Return the folder of the documentation's pages."""
    inside = PACKAGE / "docs"
    return inside if inside.is_dir() else PACKAGE.resolve().parent / "docs"
