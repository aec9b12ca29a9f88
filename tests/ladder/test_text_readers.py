"""Test how files inside packages are found and turned into documents."""

import gzip
import io
import tarfile

import pytest

from lrnn.errors import UserError
from lrnn.ladder.text.archives import members
from lrnn.ladder.text.markup import text_of_html
from lrnn.ladder.text.readers import documents_of, without_header
from lrnn.ladder.text.table import Files


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_reads_archives_inside_packages_and_compressed_files(tmp_path):
    inner = tar_of({"linux-6/a/b.c": b"int x;"}, "w:xz")
    file = tmp_path / "x-1.tar.gz"
    file.write_bytes(tar_of({"src/inner.tar.xz": inner, "man/p.1.gz": gzip.compress(b"page")}, "w:gz"))
    assert [(m.path, m.read()) for m in members(file, "src/*.tar.xz", "linux-[0-9]+/")] == [("a/b.c", b"int x;")]
    assert ("man/p.1", b"page") in [(m.path, m.read()) for m in members(file, None, "")]


def test_names_a_package_that_cannot_be_read(tmp_path):
    (tmp_path / "x_1_all.deb").write_bytes(b"!<arch>\n" + b"x" * 500)
    with pytest.raises(UserError, match=r"x_1_all\.deb cannot be read: "):
        list(members(tmp_path / "x_1_all.deb", None, ""))


def test_keeps_code_and_marks_items_of_pages():
    page = """<html><body><nav>Menu</nav><h1>Title</h1><p>One <b>two</b>
        three</p><ul><li><p>first</p></li><li>second</li></ul><pre>  if x:
      y</pre><p class="x">gone</p>tail</body></html>"""
    text = text_of_html(page.encode(), "//body", ['//p[@class="x"]'], "utf-8")
    assert text == "Title\n\nOne two three\n\n- first\n\n- second\n\n  if x:\n      y\n\ntail"


def test_removes_comments_about_copyright_at_the_beginning_alone():
    text = "// SPDX-License-Identifier: MIT\n/*\n * Copyright\n */\n/* What it does. */\nint x; /* licence */\n"
    assert without_header(text) == "/* What it does. */\nint x; /* licence */\n"
    assert without_header("/* What it does. */\nint x;\n") == "/* What it does. */\nint x;\n"


def test_cuts_dictionaries_before_entries():
    entries = [f"word{i}\n   what it means, in some words\n" for i in range(200)]
    files = Files(domain="prose", read="dictd", piece_kb=0.5)
    found = list(documents_of("a.dict", "".join(entries).encode(), files))
    assert "".join(text for _, text in found) == "".join(entries)
    assert all(text.startswith("word") for _, text in found)
    assert [path for path, _ in found][:9:8] == ["a.dict/0000/000000", "a.dict/0001/000008"]
