"""The report as one HTML page that needs no other file."""

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrnn.ladder.report.document import Block, Picture, Section, Table

TEMPLATE = "ladder.html.j2"
FRAME = "lrnn.eval.report_page"  # the package whose page it looks like


def to_html(title: str, sections: list[Section], folder: Path) -> str:
    """Return the page; its pictures are read from `folder`."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader("lrnn.ladder.report", ""), PackageLoader(FRAME, "")])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        title=title,
        sections=[{"id": section.id, "name": section.title} for section in sections],
        contents=[
            {"id": section.id, "title": section.title, "blocks": [_block(block, folder) for block in section.blocks]}
            for section in sections
        ],
    )


def _block(block: Block, folder: Path) -> dict[str, Any]:
    """Return a block as the template takes it."""
    if isinstance(block, str):
        return {"kind": "Text", "text": block}
    facts = {"kind": type(block).__name__, **asdict(block)}
    if isinstance(block, Table):
        facts["numeric"] = block.numeric
    if isinstance(block, Picture):
        facts["source"] = "data:image/png;base64," + base64.b64encode((folder / block.file).read_bytes()).decode()
    return facts
