"""Turn a file of a package into documents."""

import re
from collections.abc import Iterator

from lrnn.ladder.text.markup import text_of_html, text_of_manual
from lrnn.ladder.text.table import Files

# Where dictionaries and databases may be cut: before an entry, before a theorem with its scope, between quotations.
CUTS = {
    "dictd": re.compile(r"(?m)^(?=\S)"),
    "metamath": re.compile(r"\n\n(?=  \$\{|\$\( )"),
    "fortunes": re.compile(r"(?m)^%\n"),
}
PIECES_PER_FOLDER = 8  # pieces that follow each other count as one folder, so that a subtree is a run of them
# A comment at the beginning of a file in C, Lisp, Python, OCaml or XML style.
_COMMENT = re.compile(
    r"\A\s*(?:/\*.*?\*/|\(\*.*?\*\)|<!--.*?-->|(?:(?://|#(?!!|include|define|if)|;|--)[^\n]*\n)+)", re.S
)
_LEGAL = re.compile(r"copyright|licen[cs]e|SPDX", re.I)


def documents_of(path: str, content: bytes, files: Files) -> Iterator[tuple[str, str]]:
    """Yield the documents of a file, each with its path: that of the file, with a number if there are several.

    Raises:
        UnicodeDecodeError: the file is not in the encoding that `files` says.
    """
    if files.read in CUTS:
        text = _cleaned(content.decode(files.encoding), files)
        for number, piece in enumerate(_pieces(text, CUTS[files.read], int(files.piece_kb * 1000))):
            yield f"{path}/{number // PIECES_PER_FOLDER:04d}/{number:06d}", piece
        return
    if files.read == "html":
        text = text_of_html(content, files.body, files.drop, files.encoding)
    elif files.read == "man":
        text = text_of_manual(content)
    else:
        text = content.decode(files.encoding)
    yield path, _cleaned(text, files)


def _cleaned(text: str, files: Files) -> str:
    """Return a text without what `files` cuts, without white space at its ends and at the ends of its lines."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\0", "")
    if files.header:
        text = without_header(text)
    for pattern in files.cut:
        text = re.sub(pattern, "", text, flags=re.M | re.S)
    text = re.sub(r"[ \t\f]+$", "", text, flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def without_header(text: str) -> str:
    """Return a text without the comments at its beginning up to the last that speaks of copyright or licence."""
    place = end = 0
    while match := _COMMENT.match(text[place : place + 20_000]):
        place += match.end()
        if _LEGAL.search(match.group()):
            end = place
    return text[end:].lstrip("\n") if end else text


def _pieces(text: str, cut: re.Pattern[str], least: int) -> Iterator[str]:
    """Cut a text before matches of `cut` into pieces of at least `least` characters, which are shorter where it ends.

    What matches is replaced by a blank line inside of pieces if it is a separator.
    """
    start = 0
    for match in cut.finditer(text):
        if match.start() - start >= least:
            yield _piece(text[start : match.start()], cut)
            start = match.end()
    yield _piece(text[start:], cut)


def _piece(text: str, cut: re.Pattern[str]) -> str:
    separated = cut.sub("\n", text) if cut is CUTS["fortunes"] else text
    return separated.strip("\n") + "\n"
