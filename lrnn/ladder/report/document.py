"""A report as sections of text, tables and pictures, and as Markdown. `page.py` makes HTML of the same sections."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A table of texts and of written numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numeric(self) -> list[bool]:
        """Return which columns hold nothing but numbers, intervals and gaps."""
        return [all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Picture:
    """A picture in a PNG file beside the report."""

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Heading:
    """A heading inside of a section."""

    text: str


Block = str | Heading | Table | Picture | Bullets


@dataclass
class Section:
    """A section. One that is not `in_markdown` is only on the HTML page."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    in_markdown: bool = True

    @property
    def id(self) -> str:
        """Return a name for links."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def to_markdown(title: str, sections: list[Section]) -> str:
    """Return the report as Markdown; pictures are relative links."""
    parts = [f"# {title}"]
    for section in sections:
        if section.in_markdown:
            parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"### {block.text}"
        case Table():
            return "\n".join(
                [_row(block.columns), _row(["---:" if numeric else "---" for numeric in block.numeric])]
                + [_row(row) for row in block.rows]
            )
        case Picture():
            return f"![{block.title}]({block.file})\n\n{block.caption}"
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case _:
            return block


def _is_number(cell: str) -> bool:
    """Return whether a cell holds a number, with a unit such as M at most, an interval or nothing."""
    return not set("".join(filter(str.isalpha, cell))) - set("kMBedn") and (not cell or cell[0] in "+-[<0123456789")


def _row(cells: tuple[str, ...] | list[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
