"""Build corpora, and compare them with the output of SentencePiece and `datasets` for the same files."""

import hashlib
import json
import os
import time
from pathlib import Path

import cut_off_build
import datasets
import pytest
import sentencepiece
import xxhash
from fork_server import CONTEXT
from process_table import members

from lrnn.cli import main
from lrnn.pretrain.corpus import build as build_corpus_module
from lrnn.pretrain.corpus import shard_writer, source, streams


def documents_of(corpus: Path, split: str = "train") -> list[list[int]]:
    return datasets.load_from_disk(str(corpus / split))["tokens"][:]


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted((p for p in folder.rglob(pattern) if p.is_file()), key=lambda p: str(p.relative_to(folder)))


def expected_documents(texts, model: Path) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [[1, *processor.encode(text), 2] for text in texts]


def content(corpus: Path) -> dict[str, str]:
    """Return the sha256 of every file of the corpus except the manifest, where the order of keys is free."""
    return {
        str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files_of(corpus)
        if p.name != "manifest.json"
    }


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Return the one line that `lrnn corpus` fails with."""
    capsys.readouterr()
    assert main(["corpus", *map(str, arguments)]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and "examples/s]" not in line
    ]  # bars of `datasets`
    assert len(lines) == 1 and lines[0].startswith("lrnn: error: ")
    return lines[0]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(source, "MIN_PART_BYTES", 8 << 10)
    monkeypatch.setattr(streams, "STREAM_PART_BYTES", 8 << 10)
    monkeypatch.setattr(shard_writer, "FLUSH_TOKENS", 1000)
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 2000)


# --- what is written --------------------------------------------------------------------------------------------------


def test_folder(build_corpus, text_folder, sentencepiece_model, small_parts):
    corpus = build_corpus(text_folder)
    manifest = json.loads((corpus / "manifest.json").read_text())
    texts = [p.read_bytes().decode() for p in files_of(text_folder)]
    expected = expected_documents(texts, sentencepiece_model)

    assert documents_of(corpus) == expected
    assert datasets.load_from_disk(str(corpus / "train")).features["tokens"] == datasets.List(datasets.Value("uint16"))
    train = manifest["splits"]["train"]
    assert list(manifest["splits"]) == ["train"]
    assert train["documents"] == len(expected)
    assert train["tokens"] == sum(map(len, expected))
    assert train["bytes"] == sum(p.stat().st_size for p in files_of(text_folder))
    assert len(train["shards"]) > 3
    for shard in train["shards"]:
        data = (corpus / shard["file"]).read_bytes()
        assert shard["size"] == len(data) and shard["sha256"] == hashlib.sha256(data).hexdigest()
        table = (corpus / f"{shard['file']}.table").read_bytes()
        assert shard["table_sha256"] == hashlib.sha256(table).hexdigest()
        blocks = [data[at : at + 65536] for at in range(0, len(data), 65536)]
        assert table.startswith(b"".join(xxhash.xxh3_64(block).digest() for block in blocks))
        rows = datasets.Dataset.from_file(str(corpus / shard["file"]))["tokens"][:]
        found = (len(rows), sum(map(len, rows)), max(map(max, rows)))
        assert (shard["documents"], shard["tokens"], shard["max_token_id"]) == found
    assert (corpus / "tokenizer" / "tokenizer.model").read_bytes() == sentencepiece_model.read_bytes()
    assert manifest["tokenizer"] == {
        "kind": "sentencepiece",
        "fingerprint": hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest(),
        "vocab_size": sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model)).vocab_size(),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert sorted(p.name for p in corpus.iterdir()) == ["manifest.json", "tokenizer", "train"]
    assert not corpus.with_name("corpus.partial").exists()


def test_include_and_exclude(build_corpus, text_folder, sentencepiece_model):
    corpus = build_corpus(text_folder, "--include", "*0.txt", "--include", "d1/*", "--exclude", "d2/*")
    chosen = [
        p
        for p in files_of(text_folder)
        if (p.name.endswith("0.txt") or p.parent.name == "d1") and p.parent.name != "d2"
    ]
    assert documents_of(corpus) == expected_documents([p.read_bytes().decode() for p in chosen], sentencepiece_model)


def test_heldout_is_decided_by_the_path_alone(build_corpus, text_folder, small_parts):
    corpus = build_corpus(text_folder, "--heldout", "0.3")
    names = [str(p.relative_to(text_folder)) for p in files_of(text_folder)]
    chosen = [n for n in names if int(hashlib.sha256(n.encode()).hexdigest(), 16) / 2**256 < 0.3]
    assert 5 < len(chosen) < 30
    rows = [json.loads(line) for line in (corpus / "heldout.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == chosen
    assert [row["text"] for row in rows] == [(text_folder / n).read_bytes().decode() for n in chosen]
    train, heldout, whole = (
        {tuple(d) for d in documents}
        for documents in (
            documents_of(corpus),
            documents_of(corpus, "heldout"),
            documents_of(build_corpus(text_folder, out="whole")),
        )
    )
    assert len(heldout) == len(chosen) and train | heldout == whole and not train & heldout

    part = build_corpus(text_folder, "--heldout", "0.3", "--include", "d1/*", out="part")  # among other files
    rows = [json.loads(line) for line in (part / "heldout.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == [n for n in chosen if n.startswith("d1/")]


@pytest.fixture
def quick_processes(monkeypatch):
    """Make `--processes 2` fork a process that has imported everything, which is faster than "spawn"."""
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: CONTEXT)


def test_the_number_of_processes_changes_nothing(build_corpus, text_folder, quick_processes):
    one = build_corpus(text_folder, "--heldout", "0.2", "--train-tokenizer", "320", out="one")
    two = build_corpus(text_folder, "--heldout", "0.2", "--train-tokenizer", "320", "--processes", "2", out="two")
    assert content(one) == content(two)


def test_trained_tokenizer_keeps_text(build_corpus, text_folder):
    corpus = build_corpus(text_folder, "--train-tokenizer", "400")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer" / "tokenizer.model"))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 400
    texts = [p.read_bytes().decode() for p in files_of(text_folder)]
    documents = documents_of(corpus)
    assert [processor.decode(d[1:-1]) for d in documents] == texts
    assert all(d[0] == 1 and d[-1] == 2 and not {1, 2} & set(d[1:-1]) for d in documents)  # "</s>" appears in the texts
    for text in ["\n\n  \t x  ", "    def f():\r\n\treturn 1\n", "\x00\x0c", "한글 ∑ 👩‍👩‍👧", " ", "a" * 5000]:
        assert processor.decode(processor.encode(text)) == text


def test_tokenizer_is_not_trained_on_heldout_text(build_corpus, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        held = int(hashlib.sha256(f"{i}.txt".encode()).hexdigest(), 16) / 2**256 < 0.5
        (tmp_path / "text" / f"{i}.txt").write_text(
            ("zqzqzqzq " if held else "the cat sat on a mat with some hats and pots; ") * 50
        )
    corpus = build_corpus(tmp_path / "text", "--train-tokenizer", "300", "--heldout", "0.5")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer" / "tokenizer.model"))
    pieces = {processor.id_to_piece(i) for i in range(300)}
    assert "▁cat" in pieces and not any("z" in piece for piece in pieces)


def test_large_vocabulary_is_uint32(build_corpus, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 70_000)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("w69999 w2")
    corpus = build_corpus(tmp_path / "text", "--tokenizer", str(tmp_path / "tokenizer"))
    # Without a bos, the eos begins a document too.
    assert documents_of(corpus) == [[1, 69999, 2, 1]]
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["dtype"] == "uint32" and manifest["tokenizer"]["bos_token_id"] is None
    assert datasets.load_from_disk(str(corpus / "train")).features["tokens"] == datasets.List(datasets.Value("uint32"))


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path) -> tuple[Path, list[str]]:
    """Return two files of rows with the text in column `body`, and the texts, two of them empty."""
    texts = [f"row {i} " + "some words " * (i % 50) for i in range(300)]
    texts[7], texts[150] = "", ""
    for part in range(2):
        rows = [json.dumps({"id": i, "body": text or None}) for i, text in enumerate(texts)]
        (tmp_path / f"rows{part}.jsonl").write_text("\n".join(rows[part * 150 : part * 150 + 150]))
    return tmp_path / "rows*.jsonl", texts


@pytest.mark.parametrize("options", [[], ["--streaming"], ["--processes", "2"]])
def test_data_set(build_corpus, jsonl, sentencepiece_model, small_parts, quick_processes, options):
    files, texts = jsonl
    corpus = build_corpus("json", "--data-files", str(files), "--text-column", "body", "--heldout", "0.2", *options)
    held = [bool(t) and int(hashlib.sha256(t.encode()).hexdigest(), 16) / 2**256 < 0.2 for t in texts]
    train = [t for t, h in zip(texts, held, strict=True) if t and not h]
    assert documents_of(corpus) == expected_documents(train, sentencepiece_model)
    rows = [json.loads(line) for line in (corpus / "heldout.jsonl").read_text().splitlines()]
    names = [f"{files.parent}/rows{i // 150}.jsonl:{i % 150 + 1}" for i in range(300)]
    assert rows == [{"text": t, "source": names[i]} for i, t in enumerate(texts) if held[i]]
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert manifest["skipped"] == {"empty text": 2}
    assert len(manifest["splits"]["train"]["shards"]) > 3


def test_data_set_train_tokenizer(build_corpus, jsonl):
    files, texts = jsonl
    for options in [[], ["--streaming"]]:
        corpus = build_corpus(
            *("json", "--data-files", str(files), "--text-column", "body", "--train-tokenizer", "300"),
            *options,
            out=f"corpus{len(options)}",
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer" / "tokenizer.model"))
        assert [processor.decode(d[1:-1]) for d in documents_of(corpus)] == [t for t in texts if t]


def test_data_set_errors(jsonl, sentencepiece_model, tmp_path, capsys):
    files, _ = jsonl
    end = ["--tokenizer", sentencepiece_model, "--out", tmp_path / "corpus", "--processes", "1"]
    for streaming in [[], ["--streaming"]]:
        message = error_of(capsys, "json", "--data-files", files, *streaming, *end)
        assert "no column 'text'" in message and "['body', 'id']" in message
        assert "holds int (0)" in error_of(
            capsys, "json", "--data-files", files, "--text-column", "id", *streaming, *end
        )
        assert "cannot be loaded" in error_of(capsys, "json", "--data-files", tmp_path / "none.jsonl", *streaming, *end)
        message = error_of(capsys, "json", "--data-files", files, "--split", "nope", *streaming, *end)
        assert "no split 'nope'" in message
    assert "kind of files; name them with --data-files" in error_of(capsys, "json", *end)
    assert "no such file or folder" in error_of(capsys, tmp_path / "none", *end)
    assert "--include is for folders" in error_of(capsys, "json", "--data-files", files, "--include", "*", *end)
    (tmp_path / "empty.jsonl").write_text("\n".join(['{"text": ""}'] * 3))
    assert "empty corpus" in error_of(capsys, "json", "--data-files", tmp_path / "empty.jsonl", *end)


# --- bad files and other bad input ------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(tmp_path) -> Path:
    root = tmp_path / "bad"
    root.mkdir()
    (root / "a.txt").write_text("good text")
    (root / "b.txt").write_bytes(b"ab\xff\xfe")
    (root / "c.txt").write_bytes(b"")
    (root / "d.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "e.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.txt")  # reading it would block forever
    return root


def test_bad_files_stop_before_work(bad_folder, sentencepiece_model, tmp_path, capsys):
    end = ["--tokenizer", sentencepiece_model, "--out", tmp_path / "c", "--processes", "1"]
    message = error_of(capsys, bad_folder, *end)
    assert "4 of 5 files" in message
    assert "b.txt: not UTF-8, byte 0xff at offset 2" in message and "c.txt: zero-length" in message
    assert "--skip-bad-files" in message
    assert list(tmp_path.glob("c*")) == []


def test_bad_files_skipped(build_corpus, bad_folder, sentencepiece_model):
    corpus = build_corpus(bad_folder, "--skip-bad-files")
    assert documents_of(corpus) == expected_documents(["good text"], sentencepiece_model)
    skipped = json.loads((corpus / "manifest.json").read_text())["skipped"]
    assert skipped == {"not UTF-8": 2, "zero-length": 1, "unreadable": 1}


def test_empty_corpus(bad_folder, sentencepiece_model, tmp_path, capsys):
    end = ["--tokenizer", sentencepiece_model, "--out", tmp_path / "c", "--processes", "1"]
    assert "empty corpus" in error_of(capsys, bad_folder, "--include", "*.py", *end)
    message = error_of(capsys, bad_folder, "--exclude", "a*", "--skip-bad-files", *end)
    assert "empty corpus" in message and "4 bad ones" in message
    (tmp_path / "none").mkdir()
    assert "empty corpus" in error_of(capsys, tmp_path / "none", *end)
    (tmp_path / "rows.jsonl").write_text("")
    assert f"{tmp_path}/rows.jsonl: zero-length" in error_of(
        capsys, "json", "--data-files", tmp_path / "rows.jsonl", *end
    )
    # Every document is held out, and none is left to train on.
    assert "held out" in error_of(capsys, bad_folder, "--include", "a*", "--heldout", "0.9999", *end)
    assert not (tmp_path / "c").exists()


def test_bad_arguments(text_folder, sentencepiece_model, tmp_path, capsys):
    def error(*options, out=tmp_path / "c", tokenizer=("--tokenizer", sentencepiece_model)):
        return error_of(capsys, text_folder, "--out", out, *tokenizer, *options)

    assert "--heldout 1.0" in error("--heldout", "1.0")
    assert "--processes 0" in error("--processes", "0")
    assert "inside the source" in error(out=text_folder / "corpus")
    assert "neither" in error(tokenizer=("--tokenizer", tmp_path))
    (tmp_path / "x.model").write_bytes(b"not a model")
    assert "not a SentencePiece model" in error(tokenizer=("--tokenizer", tmp_path / "x.model"))
    assert "at least 300" in error("--processes", "1", tokenizer=("--train-tokenizer", "258"))
    assert not (tmp_path / "c.partial").exists()  # The next command would have to remove it.
    message = error("--processes", "1", tokenizer=("--train-tokenizer", "50000"), out=tmp_path / "d")
    assert "Vocabulary size too high" in message
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "only_copy.tex").write_text("")
    for overwrite in [[], ["--overwrite"]]:
        assert "is not a corpus" in error(*overwrite, out=tmp_path / "thesis")
    assert (tmp_path / "thesis" / "only_copy.tex").exists()


def test_existing_corpus_is_kept_without_overwrite(build_corpus, text_folder, sentencepiece_model, tmp_path, capsys):
    corpus = build_corpus(text_folder)
    before = content(corpus)
    end = ["--tokenizer", sentencepiece_model, "--out", corpus, "--processes", "1"]
    assert "--overwrite" in error_of(capsys, text_folder, "--include", "d1/*", *end)
    assert content(corpus) == before
    build_corpus(text_folder, "--include", "d1/*", "--overwrite")
    assert len(documents_of(corpus)) == 20


# --- cut off and started again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_unfinished_corpus_is_continued(build_corpus, jsonl, small_parts, monkeypatch, streaming, capsys):
    files, _ = jsonl
    arguments = ["json", "--data-files", str(files), "--text-column", "body", "--heldout", "0.2"]
    arguments += ["--streaming"] if streaming else []
    whole = build_corpus(*arguments, out="whole")

    written = []
    real = build_corpus_module.write_part

    def write_part(part, index, work, heldout):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(index)
        return real(part, index, work, heldout)

    monkeypatch.setattr(build_corpus_module, "write_part", write_part)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(*arguments)
    partial = whole.with_name("corpus.partial")
    (partial / "train" / "part-00003.arrow.tmp-1").write_bytes(b"half a shard")
    assert not whole.with_name("corpus").exists()

    # Other arguments do not continue this corpus.
    model = ["--tokenizer", str(partial / "tokenizer"), "--out", str(whole.with_name("corpus")), "--processes", "1"]
    assert "other arguments" in error_of(capsys, *arguments, "--heldout", "0.1", *model)

    monkeypatch.setattr(build_corpus_module, "write_part", lambda *a: written.append(a[1]) or real(*a))
    corpus = build_corpus(*arguments)
    shards = len(json.loads((whole / "manifest.json").read_text())["splits"]["train"]["shards"])
    assert written == list(range(shards))  # every part was written once
    assert content(corpus) == content(whole)
    manifests = [json.loads((c / "manifest.json").read_text()) for c in (corpus, whole)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("step", ["rename", "between", "manifest", "last"])
def test_cut_off_while_finishing(build_corpus, text_folder, small_parts, monkeypatch, step):
    whole = build_corpus(text_folder, "--heldout", "0.2", out="whole")
    real_replace, real_write = os.replace, build_corpus_module.write_json

    def replace(a, b):
        places = {"rename": "data-00002*", "between": "data-00002*.table", "manifest": "-", "last": "corpus"}
        if Path(b).match(places[step]):
            raise KeyboardInterrupt
        real_replace(a, b)

    def write_json(path, value):
        if step == "manifest" and path.name == "manifest.json":
            raise KeyboardInterrupt
        real_write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(build_corpus_module, "write_json", write_json)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(text_folder, "--heldout", "0.2")
    assert not whole.with_name("corpus").exists()
    assert content(build_corpus(text_folder, "--heldout", "0.2")) == content(whole)


def test_older_format_is_not_continued(build_corpus, text_folder, tmp_path, monkeypatch, capsys, sentencepiece_model):
    """Shards of an older version of the program have no tables."""

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_corpus_module, "FORMAT_VERSION", 1)
        patch.setattr(build_corpus_module, "write_part", fail)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(text_folder)
    arguments = [text_folder, "--tokenizer", sentencepiece_model, "--out", tmp_path / "corpus", "--processes", "1"]
    assert "another version of this program" in error_of(capsys, *arguments)


def test_changed_source_is_not_continued(build_corpus, tmp_path, monkeypatch, capsys, sentencepiece_model):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_corpus_module, "write_part", fail)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(folder)
    (folder / "a.txt").write_text("other text, and longer")
    arguments = [folder, "--tokenizer", sentencepiece_model, "--out", tmp_path / "corpus", "--processes", "1"]
    assert "changed since" in error_of(capsys, *arguments)
    corpus = build_corpus(folder, "--overwrite")
    assert documents_of(corpus) == expected_documents(["other text, and longer"], sentencepiece_model)


def test_killed_build_is_continued(tmp_path, sentencepiece_model, build_corpus, monkeypatch):
    """After SIGKILL of the main process its workers end too, and the next call finishes the corpus."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"file {i}\n" + "for x in range(100): print(x)\n" * 300)
    monkeypatch.setattr(source, "MIN_PART_BYTES", 8 << 10)
    arguments = [folder, "--out", tmp_path / "corpus", "--tokenizer", sentencepiece_model, "--processes", "2"]
    process = CONTEXT.Process(target=cut_off_build.run, args=([*map(str, arguments)], source.MIN_PART_BYTES))
    process.start()
    done = tmp_path / "corpus.partial" / "done"
    deadline = time.monotonic() + 120
    while len(list(done.glob("*.json"))) < cut_off_build.FAST_PARTS:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    running = len(members(process.pid))
    process.kill()
    process.join()
    assert running == 3
    deadline = time.monotonic() + 60
    while members(process.pid):
        assert time.monotonic() < deadline, "workers outlived the main process"
        time.sleep(0.1)
    assert not (tmp_path / "corpus").exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in done.glob("*.json")}
    survivors = {p.name: p.stat().st_ino for p in (tmp_path / "corpus.partial" / "train").glob("part-*.arrow")}
    corpus = build_corpus(folder)
    kept = {p.stat().st_ino for p in (corpus / "train").glob("*.arrow")}
    assert stamps and kept.issuperset(survivors[n.replace(".json", ".arrow").join(["part-", ""])] for n in stamps)
    assert content(corpus) == content(build_corpus(folder, out="whole"))
