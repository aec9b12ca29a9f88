"""Build corpora from files and folders of every kind, and compare the documents with the texts that were written."""

import bz2
import gzip
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain.corpus import file_source, source
from lrnn.pretrain.corpus.file_rows import read_rows
from lrnn.pretrain.corpus.file_source import FileSource
from lrnn.pretrain.corpus.locate import locate
from lrnn.pretrain.corpus.rows import DataFile
from lrnn.pretrain.corpus.source import SourceArguments
from lrnn.pretrain.corpus.streams import FileStream

TEXTS = ["one\ntwo", "  trois, é 日本 🎉\r\n", '"quoted" text', "NA", "a\tb", "</s>"]
JSON_LINES = "".join(json.dumps({"n": i, "text": text, "meta": {"i": i}}) + "\n" for i, text in enumerate(TEXTS))


def texts_of(path: object, *, streaming: bool = False, **arguments) -> tuple[list[str], str]:
    """Return the texts of a source's documents, and what it was taken for."""
    arguments = SourceArguments(str(path), **arguments)
    located = locate(arguments)
    if streaming:
        return [document.text for document in FileStream(located, arguments).start(0, None)], located.what
    parts = FileSource(located, arguments, lambda check, files, _: map(check, files)).parts()
    return [document.text for part in parts for document in part.documents()], located.what


both = pytest.mark.parametrize("streaming", [False, True])


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def csv_of(texts: list[str], delimiter: str) -> str:
    quoted = (text.replace('"', '""') for text in texts)
    return f"n{delimiter}text\n" + "".join(f'{i}{delimiter}"{text}"\n' for i, text in enumerate(quoted))


def write_all(folder: Path) -> dict[str, Path]:
    """Write the texts as files of every kind."""
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    lines = JSON_LINES.encode()
    half = len(JSON_LINES.partition("\n")[0]) + 1
    content = {
        "lines.jsonl": lines,
        "crlf.ndjson": lines.replace(b"\n", b"\r\n"),
        "mark.jsonl": b"\xef\xbb\xbf" + lines,
        "no_suffix": lines,
        "dump.txt": lines,
        "array.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
        "pretty.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
        "columns.json": json.dumps({"text": TEXTS}, indent=1).encode(),
        "objects.json": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS).encode(),
        "strings.jsonl": "\n".join(map(json.dumps, TEXTS)).encode(),
        "comma.csv": csv_of(TEXTS, ",").encode(),
        "tab.tsv": b"\xef\xbb\xbf" + csv_of(TEXTS, "\t").encode(),
        "x.jsonl.gz": gzip.compress(lines[:half]) + gzip.compress(lines[half:]),
        "x.jsonl.zst": zstd(lines[:half]) + zstd(lines[half:]),
        "skipped_frame.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd(lines),
        "x.jsonl.bz2": bz2.compress(lines),
        "x.jsonl.xz": lzma.compress(lines),
        "comma.csv.zst": zstd(csv_of(TEXTS, ",").encode()),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), folder / "dictionary.parquet")
    pq.write_table(pa.table({"text": [text.encode() for text in TEXTS]}), folder / "binary.parquet")
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "stream.arrow.gz").write_bytes(gzip.compress((folder / "stream.arrow").read_bytes()))
    return {path.name: path for path in sorted(folder.iterdir())}


@both
def test_every_kind_of_file(tmp_path, streaming):
    files = write_all(tmp_path)
    assert len(files) > 20
    for name, path in files.items():
        texts, what = texts_of(path, streaming=streaming)
        assert texts == TEXTS, name
        assert f"{path}: 1 " in what and "every row is a document, its text in column 'text'" in what


def test_rows_can_be_read_from_any_on(tmp_path):
    for path in write_all(tmp_path).values():
        kind = locate(SourceArguments(str(path))).files[0].kind
        file = DataFile(str(path), "x", kind, "\t" if path.suffix == ".tsv" else ",")
        whole = list(read_rows(file, "text"))
        assert [row.value for row in whole] == TEXTS
        for row in whole:
            for restart in {0, row.restart or 0}:
                later = list(read_rows(file, "text", row.number, restart))
                assert [(r.number, r.value) for r in later] == [(r.number, r.value) for r in whole[row.number :]]


@both
def test_folders(tmp_path, streaming):
    def folder(name: str, **files: bytes) -> Path:
        for file, data in files.items():
            path = tmp_path / name / file.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / name

    lines = JSON_LINES.encode()

    def check(path: Path, texts: list[str], said: str, **arguments) -> None:
        found, what = texts_of(path, streaming=streaming, **arguments)
        assert found == texts
        assert said in what

    of_rows = folder("rows", a_DOT_jsonl=lines, sub__b_DOT_jsonl_DOT_gz=gzip.compress(lines), README_DOT_md=b"# rows")
    check(of_rows, TEXTS * 2, "2 JSON files; every row")
    check(of_rows, TEXTS, "1 JSON file", include=["*.gz"])
    check(of_rows, TEXTS, "1 JSON file", data_files=["a.*"])
    mixed = folder("mixed", a_DOT_jsonl=lines, b_DOT_csv=csv_of(TEXTS, ",").encode(), _SUCCESS=b"")
    check(mixed, TEXTS * 2, "1 JSON file and 1 CSV file")
    check(folder("parts", **{"part-00000": lines, "part-00001": lines}), TEXTS * 2, "2 JSON files")
    splits = folder("splits", train_DOT_jsonl=lines, test_DOT_jsonl=b'{"text": "of the test"}\n')
    check(splits, TEXTS, "split 'train', 1 of 2 files")
    check(splits, ["of the test"], "split 'test', 1 of 2 files", split="test")
    rest = folder("rest", web_DOT_jsonl=lines, validation_DOT_jsonl=b'{"text": "x"}\n')
    check(rest, TEXTS, "split 'train', 1 of 2 files")
    card = b"---\nconfigs:\n- config_name: default\n  data_files: data/b.jsonl\n---\n# a data set\n"
    hub = folder("hub", README_DOT_md=card, data__a_DOT_jsonl=b"not read", data__b_DOT_jsonl=lines)
    check(hub, TEXTS, "data set")
    # Source code has files of JSON, each of which is a document there.
    code = folder("code", a_DOT_py=b"print(1)\n", b_DOT_json=b'{"text": 1}')
    check(code, ["print(1)\n", '{"text": 1}'], "2 text files; every text file is a document")
    check(code, ["print(1)\n"], "1 text file", exclude=["*.json"])
    check(folder("packed", a_DOT_txt_DOT_gz=gzip.compress(b"some text\n")), ["some text\n"], "1 text file")
    two = folder("two", rows_DOT_jsonl=lines, x_DOT_c=b"int x;")
    check(two, [JSON_LINES, "int x;"], "2 text files", kind="text")


@both
def test_saved_data_sets(tmp_path, streaming):
    rows = datasets.Dataset.from_list([{"text": text, "n": i} for i, text in enumerate(TEXTS)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "dict")
    texts, what = texts_of(tmp_path / "one", streaming=streaming)
    assert texts == TEXTS and "saved data set" in what and "2 Arrow files" in what
    assert texts_of(tmp_path / "dict", streaming=streaming)[0] == TEXTS
    assert texts_of(tmp_path / "dict", streaming=streaming, split="test")[0] == TEXTS[1:2]


@both
def test_text_by_document_and_by_line(tmp_path, streaming):
    book = tmp_path / "book.txt"
    book.write_bytes("\ufeffChapter 1\r\n\r\nIt rained.\nThe end".encode())
    whole, lines = ["Chapter 1\r\n\r\nIt rained.\nThe end"], ["Chapter 1\r\n", "", "It rained.\n", "The end"]
    by_builder = {"data_files": str(book), "streaming": streaming}
    assert texts_of(book, streaming=streaming) == (whole, f"{book}: 1 text file; every text file is a document")
    texts, what = texts_of(book, streaming=streaming, sample_by="line")
    assert texts == lines and "every line is a document (--sample-by document: every file)" in what
    assert texts_of("text", **by_builder)[0] == lines
    assert texts_of("text", sample_by="document", **by_builder)[0] == whole


@both
def test_columns_that_are_not_read(tmp_path, streaming):
    """Whatever they hold, and whether they are there."""
    others = ['"meta": {"a": 1}', '"meta": "none"', '"url": null', '"url": "x"', '"n": NaN', f'"n": {"1" * 5000}']
    others += ['"half": "\\ud83d"', '"": []', '"text ": 1']
    lines = [f'{{"text": "row {i}", {other}}}\n' for i, other in enumerate(others)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_bytes(b'{"author": "caf\xe9", "text": "latin"}\n')
    (tmp_path / "c.csv").write_bytes(b"author,text\ncaf\xe9,of c\n")
    expected = [f"row {i}" for i in range(len(others))] + ["latin", "of c"]
    assert texts_of(tmp_path, streaming=streaming)[0] == expected
    assert texts_of("json", streaming=streaming, data_files=f"{tmp_path}/?.jsonl")[0] == expected[:-1]


def test_the_command_says_what_it_reads(build_corpus, tmp_path, sentencepiece_model, capsys):
    (tmp_path / "rows.jsonl").write_text(JSON_LINES + '{"text": null}\n')
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for options in ([], ["--streaming"]):
        corpus = build_corpus(tmp_path / "rows.jsonl", "--overwrite", *options)
        documents = datasets.load_from_disk(str(corpus / "train"))["tokens"][:]
        assert documents == [[1, *processor.encode(text), 2] for text in TEXTS]
        printed = capsys.readouterr().out
        assert f"reading {tmp_path}/rows.jsonl: 1 JSON file; every row is a document" in printed
        assert "left out: 1 documents, empty text" in printed


def test_what_is_not_clear_is_refused(tmp_path, sentencepiece_model, capsys):
    def error(path: object, *options: str) -> str:
        end = ["--tokenizer", str(sentencepiece_model), "--out", str(tmp_path / "c"), "--processes", "1"]
        assert main(["corpus", str(path), *options, *end]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    for name in ("rows.jsonl", "notes.rst", "main.c"):
        (tmp_path / "mixed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mixed" / name).write_text("x")
    message = error(tmp_path / "mixed")
    assert "holds data files (1, such as rows.jsonl) beside others (2, such as main.c)" in message
    assert "--include '*.jsonl'" in message and "--kind text" in message
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "is an archive; unpack it" in error(tmp_path / "a.zip")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text('{"format": "lrnn-corpus"}')
    assert "is a corpus already; train on it: data.corpora" in error(tmp_path / "corpus")
    (tmp_path / "a.txt").write_text("x")
    assert "has no split 'test'" in error(tmp_path / "a.txt", "--split", "test")
    assert "no such file or folder" in error("folder/rows.parquet")
    assert "no such file or folder, and as a data set of the hub it cannot be loaded" in error("some/name")
    capsys.readouterr()
    datasets.DatasetDict(dev=datasets.Dataset.from_dict({"text": ["x"]})).save_to_disk(tmp_path / "dict")
    assert "has no split 'train'; --split NAME can be one of ['dev']" in error(tmp_path / "dict")


def test_files_are_cut_into_pieces(tmp_path, monkeypatch):
    """The documents are the same, in the same order, however the files are cut for the processes."""
    rng = random.Random(0)
    texts = [f"{i} " + "word " * rng.randint(1, 60) for i in range(400)]
    lines = "".join(json.dumps({"text": t}) + "\n" * rng.randint(1, 3) for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.csv").write_text("text\n" + "".join(f"{t}\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=30)
    monkeypatch.setattr(source, "MIN_PART_BYTES", 3000)
    monkeypatch.setattr(file_source, "SLOW_PIECE_BYTES", 5000)
    arguments = SourceArguments(str(tmp_path))
    cut = FileSource(locate(arguments), arguments, lambda check, files, _: map(check, files))
    pieces = Counter(piece.file.label for piece in cut.pieces)
    assert min(pieces.values()) > 10 and cut.num_parts > 20
    assert [document.text for part in cut.parts() for document in part.documents()] == texts * 4
    assert sorted(cut.sample(10**9, 0.0)) == sorted(texts * 4)
    sample = list(cut.sample(20_000, 0.0))
    assert 20_000 <= sum(map(len, sample)) < 21_000 and len({text.split()[0] for text in sample}) > len(sample) / 2


@both
def test_files_at_a_url(monkeypatch, streaming):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # refuses any URL otherwise
    MemoryFileSystem().pipe("/lrnn/rows.jsonl.gz", gzip.compress(JSON_LINES.encode()))
    texts, what = texts_of("memory://lrnn/rows.jsonl.gz", streaming=streaming)
    assert texts == TEXTS and "1 JSON file" in what
    with pytest.raises(UserError, match="no such file"):
        locate(SourceArguments("json", data_files="memory://lrnn/none*.jsonl"))
