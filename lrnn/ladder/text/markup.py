"""Turn HTML and manual pages into plain text."""

import re
import subprocess

from lrnn.errors import UserError

LINE, PARAGRAPH = 1, 2  # line breaks that an element needs around it
_BREAKS = dict.fromkeys(("br", "div", "li", "tr", "dt", "dd", "section", "article", "ul", "ol", "dl", "table"), LINE)
_BREAKS |= dict.fromkeys(("p", "pre", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "hr"), PARAGRAPH)
_WITHOUT_TEXT = "//script|//style|//noscript|//nav|//head|//comment()|//processing-instruction()"
# No justified lines and no hyphenation, whatever the macros ask for.
_RAGGED = b".na\n.de ad\n..\n.nh\n.de hy\n..\n"
_SPACE = re.compile(r"\s+")


def text_of_html(page: bytes, body: str, drop: list[str], encoding: str) -> str:
    """Return the text of a page: paragraphs with blank lines between, `- ` before list items, code as it is.

    Args:
        body: XPath of the elements that hold the text.
        drop: XPaths of elements to leave out.
    """
    import lxml.html

    root = lxml.html.document_fromstring(page, parser=lxml.html.HTMLParser(encoding=encoding))
    for element in root.xpath("|".join([_WITHOUT_TEXT, *drop])):
        if element.getparent() is not None:
            element.drop_tree()
    return "\n\n".join(filter(None, (_render(element) for element in root.xpath(body))))


def _render(body) -> str:
    from lxml import etree

    out: list[str | int] = [LINE]
    verbatim = 0  # depth of <pre>
    for event, element in etree.iterwalk(body, events=("start", "end")):
        name, text = element.tag, element.text
        if event == "end":
            verbatim -= name == "pre"
            text = element.tail if element is not body else None
        if name in _BREAKS:
            out.append(_BREAKS[name])
        if name in ("td", "th") and event == "end":
            out.append("  ")
        if name == "li" and event == "start":
            out.append("- ")
        if event == "start":
            verbatim += name == "pre"
        if text and not verbatim:
            text = _SPACE.sub(" ", text)
            text = text.lstrip() if isinstance(out[-1], int) else text
        if text:
            out.append(text)
    return _joined(out)


def _joined(parts: list[str | int]) -> str:
    """Join texts and breaks. Of breaks in a row, the longest counts."""
    texts = []
    pending = 0
    for part in parts:
        if isinstance(part, int):
            pending = max(pending, part)
        else:
            texts.append("\n" * pending + part)
            pending = 0
    text = re.sub(r"[ \t]+\n", "\n", "".join(texts))
    text = re.sub(r"(?m)^-\n+(?=\S)", "- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def text_of_manual(page: bytes) -> str:
    """Return a manual page as groff prints it on a terminal, without bold and hyphenation.

    Raises:
        UserError: groff is not installed.
    """
    command = ["groff", "-k", "-t", "-man", "-Tutf8", "-rLL=90n", "-P-c", "-P-b", "-P-u", "-P-o"]
    try:
        done = subprocess.run(command, input=_RAGGED + page, capture_output=True)
    except FileNotFoundError:
        raise UserError("groff is needed to read manual pages; it is Debian's package groff-base") from None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    # The first and last lines are the title and the date of the page.
    text = "\n".join(line.rstrip() for line in lines[1:-1])
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
