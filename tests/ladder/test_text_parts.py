"""Test tokens in parts: what is unpacked is what the text says, from any number of parts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lrnn.errors import UserError
from lrnn.files import write_json
from lrnn.ladder.text import assemble, chunks, pack, report, unpack
from lrnn.pretrain.corpus import TokenCorpus

CHUNKS = 6


def write_rows(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"text": text, "package": path.parent.name, "path": "p"}) + "\n" for text in texts)
    )


def text(seed: int) -> str:
    r = np.random.default_rng(seed)
    return " ".join("".join(r.choice(list("abcdefgh"), 5)) for _ in range(r.integers(20, 200))) + f"\n{seed}\n"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with text of two domains, one of which has fewer files than there are chunks, and its parts."""
    folder = tmp_path_factory.mktemp("ladder_text")
    for number in range(CHUNKS):
        write_rows(folder / f"text/code/train-{number:04d}.jsonl", [text(100 * number + i) for i in range(20)])
    for number in range(2):
        write_rows(folder / f"text/prose/train-{number:04d}.jsonl", [text(9000 + 100 * number + i) for i in range(5)])
    for domain in ("code", "prose"):
        write_rows(folder / f"text/{domain}/heldout.jsonl", [text(20_000 + len(domain) * 10 + i) for i in range(4)])
    write_json(folder / "text/manifest.json", {})
    with pytest.MonkeyPatch.context() as patch:
        for module in (assemble, chunks):
            patch.setattr(module, "CHUNKS", CHUNKS)
        patch.setattr(chunks, "VOCAB_SIZE", 400)
        patch.setattr(chunks, "HELDOUT_TRACES", 2)
        chunks.make_chunks(folder, math.inf, 1, lambda said: None)
        first = pack.pack(folder, lambda said: None)  # all in one part
        assert len(first) == 1
        sizes = [file.stat().st_size for file in (folder / "chunks").glob("*-0*.xz")]
        most = first[0].stat().st_size - sum(sizes) * 2 // 3 + 32_768
        parts = pack.pack(folder, lambda said: None, most_bytes=most)
        assert len(parts) > 1 and all(part.stat().st_size <= most for part in parts)
        yield folder, parts


def documents(corpus: Path, split: str) -> list[list[int]]:
    """Return the documents of a corpus as `datasets` reads them."""
    from datasets import load_from_disk

    return load_from_disk(str(corpus / split))["tokens"][:]


def expected(folder: Path, domain: str, pattern: str) -> list[list[int]]:
    """Return the documents of JSON lines of a domain, as the library of the tokenizer encodes them."""
    return encoded(folder, sorted((folder / "text" / domain).glob(pattern)))


def encoded(folder: Path, files: list[Path]) -> list[list[int]]:
    tool = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/tokenizer.model"))
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    return [[tool.bos_id(), *tool.encode(text), tool.eos_id()] for text in texts]


def test_unpacks_the_tokens_of_the_text(packed, tmp_path):
    folder, parts = packed
    tokens = unpack.unpack(parts[::-1], tmp_path / "corpora", 1)
    for domain in ("code", "prose"):
        corpus = tmp_path / "corpora" / domain
        assert documents(corpus, "train") == expected(folder, domain, "train-*.jsonl")
        assert documents(corpus, "heldout") == expected(folder, domain, "heldout.jsonl")
        assert (corpus / "heldout.jsonl").read_bytes() == (folder / f"text/{domain}/heldout.jsonl").read_bytes()
        assert TokenCorpus(corpus, "train").num_tokens == tokens[domain]["train"]
    counts = json.loads((folder / "parts/counts.json").read_text())
    assert counts["train"]["prose"]["prose"]["documents"] == 10
    assert counts["heldout"]["code"]["code"]["tokens"] == tokens["code"]["heldout"]


def test_first_parts_hold_their_share_of_every_domain(packed, tmp_path):
    folder, parts = packed
    unpacked = unpack.unpack(parts[:1], tmp_path / "corpora", 1)
    whole = [len(expected(folder, domain, "train-*.jsonl")) for domain in ("code", "prose")]
    found = [len(documents(tmp_path / "corpora" / domain, "train")) for domain in ("code", "prose")]
    assert 0 < found[0] < whole[0] and 0 < found[1] < whole[1]
    assert unpacked["traces"]["train"] > 0


def test_programs_differ_between_chunks_and_from_those_held_out(packed, tmp_path):
    folder, parts = packed
    unpack.unpack(parts, tmp_path / "corpora", 1)
    traces = tmp_path / "corpora/traces"
    assert documents(traces, "heldout") == encoded(folder, [traces / "heldout.jsonl"])
    found = [tuple(d) for split in ("train", "heldout") for d in documents(tmp_path / "corpora/traces", split)]
    assert len(found) >= CHUNKS + 2 and len(set(found)) == len(found)


def test_refuses_parts_with_a_gap(packed, tmp_path):
    with pytest.raises(UserError, match=r"parts \[1\] should be 0, 1, 2, \.\.\. without a gap"):
        unpack.unpack(packed[1][1:2], tmp_path / "corpora", 1)
    assert not (tmp_path / "corpora").exists()


def test_refuses_parts_of_another_pack(packed, tmp_path):
    _, parts = packed
    content = parts[1].read_bytes()
    begin = content.index(b'"pack": "') + 9
    (tmp_path / "part-01.tar").write_bytes(content[:begin] + b"0" * 64 + content[begin + 64 :])
    with pytest.raises(UserError, match=r"part-00\.tar.*part-01\.tar are parts of different packs"):
        unpack.unpack([parts[0], tmp_path / "part-01.tar"], tmp_path / "corpora", 1)


def test_names_a_damaged_part(packed, tmp_path):
    content = bytearray(packed[1][0].read_bytes())
    place = content.index(b"code-0000.xz") + 512 + 200
    content[place] ^= 255
    (tmp_path / "part-00.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"part-00\.tar is damaged .*copy it again"):
        unpack.unpack([tmp_path / "part-00.tar"], tmp_path / "corpora", 1)
    assert not (tmp_path / "corpora").exists()


def test_makes_the_chunk_again_that_was_interrupted(packed):
    folder, _ = packed
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (folder / "chunks").iterdir()}
    (folder / "chunks/code-0002.xz").write_bytes(b"")
    (folder / "chunks/traces-0002.json").unlink()
    chunks.make_chunks(folder, math.inf, 1, lambda said: None)
    for file in (folder / "chunks").iterdir():
        time, content = before[file.name]
        assert file.read_bytes() == content
        assert (file.stat().st_mtime_ns == time) == ("-0002" not in file.name)


def test_refuses_chunks_of_other_text(packed, tmp_path):
    folder, _ = packed
    manifest = (folder / "text/manifest.json").read_bytes()
    try:
        write_json(folder / "text/manifest.json", {"key": "other"})
        with pytest.raises(UserError, match=r"tokenizer was trained on other text; remove it"):
            chunks.make_chunks(folder, math.inf, 1, lambda said: None)
    finally:
        (folder / "text/manifest.json").write_bytes(manifest)


def test_table_adds_up_tokens_of_all_text_from_those_of_the_chunks_that_were_made():
    about = {"version": "1", "licence": "MIT", "download_bytes": 5_000_000}
    documents = {"train": {"documents": 10, "bytes": 30_000_000}, "heldout": {"documents": 1, "bytes": 3_000_000}}
    packages = {
        "aaa": {**about, "text": {"code": documents, "prose": documents}},
        "bbb": {**about, "text": {"code": documents}},
    }
    half = {"documents": 5, "bytes": 15_000_000, "tokens": 5_000_000}
    held = {"documents": 1, "bytes": 3_000_000, "tokens": 1_000_000}
    counts = {
        "train": {"code": {"aaa": half, "bbb": half}, "prose": {"aaa": half}},
        "heldout": {"code": {"aaa": held, "bbb": held}, "prose": {"aaa": held}},
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.table({"packages": packages}, counts).splitlines()
    ]
    assert rows[2] == ["aaa", "1", "MIT", "5.0", "10", "30.0", "10.00", "3.00", "1", "1.00"]
    assert rows[-1] == ["**all text**", "", "", "10.0", "30", "90.0", "30.00", "3.00", "3", "3.00"]
    counts["train"]["code"]["bbb"] = {"documents": 10, "bytes": 30_000_000, "tokens": 9_000_000}  # all of it
    assert "| bbb | 1 | MIT | 5.0 | 10 | 30.0 | 9.00 | 3.33 | 1 | 1.00 |" in report.table(
        {"packages": packages}, counts
    )
