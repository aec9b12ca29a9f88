"""Test what cannot be used: a line that names file and row, or left out and counted, the same for files and streams."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain.corpus.file_source import FileSource
from lrnn.pretrain.corpus.locate import locate
from lrnn.pretrain.corpus.source import SourceArguments
from lrnn.pretrain.corpus.streams import FileStream

GOOD = [f"row {i}" for i in range(3)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in GOOD).encode()
NAMES = [f"a{i}" for i in range(400)]
MANY = "".join(json.dumps({"text": name * 5}) + "\n" for name in NAMES).encode()

BAD_ROWS = [  # (line of JSON, message, reason)
    (b'{"text": "caf\xe9"}', "column 'text' is not UTF-8, byte 0xe9 at character 3", "not UTF-8"),
    (b'{"text": "cut of', "not JSON (Unterminated string starting at character 9)", "not JSON"),
    (b"\0\0\0\0", "not JSON (Expecting value at character 0)", "not JSON"),
    (b'{"text": "half \\ud83d"}', "half a surrogate pair, U+D83D at character 5", "half a surrogate pair"),
    (b'{"text": "\\u0000\\u0000x"}', "2 of 3 characters are NUL: this is no text", "NUL characters"),
    (b'{"text": 7}', "column 'text' holds int (7), it should hold text", "not text"),
    (b'{"text": ["a"]}', "column 'text' holds list (['a']), it should hold text", "not text"),
    (b'{"content": "x"}', "no column 'text'; the text column can be one of ['content']", "no column 'text'"),
    (b"[1]", "list instead of an object with a column 'text'", "not an object"),
    (b"[" * 200_000, "not JSON that can be read: too many values inside each other", "not JSON"),
]


def read(path: object, streaming: bool, **arguments) -> tuple[list[str], dict[str, int]]:
    """Return the texts of a source, and what was left out, by reason."""
    arguments = SourceArguments(str(path), **arguments)
    located = locate(arguments)
    if streaming:
        stream = FileStream(located, arguments)
        return [document.text for document in stream.start(0, None)], dict(stream.left_out.counts)
    source = FileSource(located, arguments, lambda check, files, _: map(check, files))
    parts = list(source.parts())
    texts = [document.text for part in parts for document in part.documents()]
    return texts, dict(sum((part.left_out.counts for part in parts), source.skipped))


def refused(path: object, streaming: bool, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(path, streaming, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


both = pytest.mark.parametrize("streaming", [False, True])


@both
@pytest.mark.parametrize(("line", "message", "reason"), BAD_ROWS)
def test_rows_of_json(tmp_path, line, message, reason, streaming):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES + line + b"\n" + LINES)
    found = refused(tmp_path, streaming)
    assert f"b.jsonl, row 4: {message}" in found and "--skip-bad-rows" in found
    assert "data.stream.skip_bad_rows=true" in refused(tmp_path, streaming, of_run=True)
    assert "b.jsonl, row 4" in refused(tmp_path, streaming, skip_bad_files=True)
    assert read(tmp_path, streaming, skip_bad_rows=True) == (GOOD * 3, {reason: 1})


@both
def test_rows_of_other_kinds(tmp_path, streaming):
    # The second text is not UTF-8, which pyarrow does not check.
    lengths, data = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9b")
    column = pa.StringArray.from_buffers(3, lengths, data)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: column 'text' is not UTF-8, byte 0xe9 at offset 0" in refused(tmp_path, streaming)
    assert read(tmp_path, streaming, skip_bad_rows=True) == (["a", "b"], {"not UTF-8": 1})
    pq.write_table(pa.table({"text": [5, None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 1: column 'text' holds int (5)" in refused(tmp_path, streaming)
    assert read(tmp_path, streaming, skip_bad_rows=True) == ([""], {"not text": 1})

    table = tmp_path / "t.csv"
    for row, message, reason in [
        (b"caf\xe9,1", "column 'text' is not UTF-8, byte 0xe9 at character 3", "not UTF-8"),
        (b"one, two,1", "3 fields, but the header has 2: is text with ',' quoted?", "another number of fields"),
        (b'"a"b,1', "not CSV (',' expected after '\"')", "not CSV"),
    ]:
        table.write_bytes(b"text,n\nx,1\n" + row + b"\ny,2\n")
        assert f"t.csv, row 2: {message}" in refused(table, streaming)
        assert read(table, streaming, skip_bad_rows=True) == (["x", "y"], {reason: 1})
    table.write_bytes(b'text\nx\n"never closed\ny\n')
    assert "t.csv, row 2: not CSV (unexpected end of data)" in refused(table, streaming)

    text = tmp_path / "lines.txt"
    text.write_bytes(b"good\ncaf\xe9\nmore\n")
    assert "lines.txt, row 2: not UTF-8, byte 0xe9 at offset 3" in refused(text, streaming, sample_by="line")
    options = {"sample_by": "line", "skip_bad_rows": True}
    assert read(text, streaming, **options) == (["good\n", "more\n"], {"not UTF-8": 1})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


def arrow_stream(path: Path) -> bytes:
    table = pa.table({"text": NAMES})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return path.read_bytes()


def bad_files(folder: Path) -> dict[str, tuple[bytes, str, str]]:
    """Return (content, message, reason) by name."""
    stream = arrow_stream(folder / "whole")
    pq.write_table(pa.table({"text": NAMES}), folder / "whole")
    parquet = (folder / "whole").read_bytes()
    (folder / "whole").unlink()
    packed = gzip.compress(MANY)
    zst = pa.compress(MANY, "zstd", asbytes=True)
    ended = "Compressed file ended before the end-of-stream marker was reached"
    return {
        "empty.jsonl": (b"", "b.jsonl: zero-length", "zero-length"),
        "empty.csv": (b"", "b.csv: zero-length", "zero-length"),
        "empty.parquet": (b"", "b.parquet: zero-length", "zero-length"),
        "empty.jsonl.gz": (gzip.compress(b""), "b.jsonl.gz: zero-length", "zero-length"),
        "cut.jsonl.gz": (packed[:600], f": cut off, {ended}", "cut off"),
        "sum.jsonl.gz": (packed[:-8] + b"12345678", "row 401: unreadable, CRC check failed", "unreadable"),
        "cut.jsonl.zst": (zst[:-9], ": cut off, Truncated compressed stream", "cut off"),
        "cut.parquet": (parquet[:-40], "b.parquet: unreadable, Parquet magic bytes not found", "unreadable"),
        "no.parquet": (LINES, "b.parquet: unreadable, Parquet magic bytes not found", "unreadable"),
        "cut.arrow": (stream[: len(stream) // 2], "row 101: unreadable, Expected to be able to read", "unreadable"),
        "cut.json": (b'[{"text": "row 0"}, {"te', "b.json, row 2: cut off, the array does not end", "cut off"),
        "no.json": (b"[1] x", "b.json, row 2: not JSON, text after the end of the array", "not JSON"),
        "wide.jsonl": (MANY.decode().encode("utf-16"), "it begins with the byte-order mark of UTF-16", "not UTF-8"),
        "columns.csv": (b"body\nx\n", "b.csv: no column 'text'; the text column can be one of ['body']", "no column"),
        **{
            f"pointer{suffix}": (POINTER, f"b{suffix}: a pointer of Git LFS in place of", "a pointer of Git LFS")
            for suffix in (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".arrow")
        },
    }


@both
def test_files(tmp_path, streaming):
    (tmp_path / "in").mkdir()
    for name, (content, message, reason) in bad_files(tmp_path).items():
        suffix = name[name.index(".") :]
        bad = tmp_path / "in" / f"b{suffix}"
        (tmp_path / "in" / "a.jsonl").write_bytes(LINES)
        (tmp_path / "in" / "c.jsonl").write_bytes(LINES)
        bad.write_bytes(content)
        found = refused(tmp_path / "in", streaming, skip_bad_rows=True)
        assert message in found and f"b{suffix}" in found and "--skip-bad-files" in found, name
        texts, left_out = read(tmp_path / "in", streaming, skip_bad_files=True, skip_bad_rows=True)
        assert texts[:3] == texts[-3:] == GOOD and 6 <= len(texts) <= 406
        assert [key.startswith(f"file: {reason}") for key in left_out if key != "not an object"] == [True], left_out
        assert set(left_out.values()) == {1}
        bad.unlink()


@both
def test_what_a_damaged_file_still_gives(tmp_path, streaming):
    """The rows before the damage, the same from files and streams."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(MANY)[:600])
    texts, left_out = read(tmp_path / "a.jsonl.gz", streaming, skip_bad_files=True)
    assert 10 < len(texts) < 400 and texts == [name * 5 for name in NAMES[: len(texts)]]
    assert left_out == {"file: cut off": 1}


@both
def test_text_files(tmp_path, streaming):
    for data, message in [
        (b"", "zero-length"),
        (b"caf\xe9", "not UTF-8, byte 0xe9 at offset 3"),
        (b"\xef\xbb\xbfcaf\xe9", "not UTF-8, byte 0xe9 at offset 6"),
        ("text".encode("utf-16"), "it begins with the byte-order mark of UTF-16"),
        ("text".encode("utf-16-le"), "NUL characters, 4 of 8 characters are NUL: this is no text"),
        (b"\0" * 100, "100 of 100 characters are NUL"),
        (gzip.compress(MANY)[:600], "cut off"),
        (POINTER, "a pointer of Git LFS in place of the file; fetch it with `git lfs pull`"),
    ]:
        (tmp_path / "a.c").write_bytes(b"good\0 text is kept as it is, \r\n too")
        (tmp_path / "b.c").write_bytes(data)
        found = refused(tmp_path, streaming)
        assert message in found and "b.c: " in found and "--skip-bad-files" in found
        texts, left_out = read(tmp_path, streaming, skip_bad_files=True)
        assert texts == ["good\0 text is kept as it is, \r\n too"] and list(left_out.values()) == [1]


@both
def test_a_wrong_column_is_told_at_once(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1, "body": "x"}\n' * 3)
    message = refused(tmp_path, streaming, skip_bad_rows=True, skip_bad_files=True)
    assert "a.jsonl, row 1: no column 'text'; the text column can be one of ['body', 'n']" in message
    assert "--text-column NAME" in message


def test_the_command_counts_and_resumes_with_the_option(tmp_path, sentencepiece_model, capsys):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"broken\n" + LINES + b'{"text": 5}\n' + b'{"text": 6}\n')
    for more in ([], ["--streaming"]):
        out = tmp_path / f"corpus{len(more)}"
        end = ["--tokenizer", str(sentencepiece_model), "--out", str(out), "--processes", "1"]
        assert main(["corpus", str(tmp_path / "a.jsonl"), *more, *end]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lrnn: error: ") and "a.jsonl, row 4: not JSON (Expecting value at character 0)" in line
        # What the stream gave before is still good, so the build may be continued with the option.
        assert main(["corpus", str(tmp_path / "a.jsonl"), *more, *end, "--skip-bad-rows"]) == 0
        printed = capsys.readouterr().out
        assert "left out: 1 documents, not JSON\nleft out: 2 documents, not text\n" in printed
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["skipped"] == {"not JSON": 1, "not text": 2}
        assert manifest["splits"]["train"]["documents"] == 6
