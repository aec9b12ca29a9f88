"""Test reading a corpus: the stream of tokens as `datasets.load_from_disk` sees it, and all that can be wrong."""

import json
import shutil
from itertools import accumulate, chain
from pathlib import Path

import datasets
import numpy as np
import pytest

from lrnn.errors import UserError
from lrnn.pretrain.corpus import shard_writer, source
from lrnn.pretrain.corpus.block_reader import CorruptData
from lrnn.pretrain.corpus.reader import TokenCorpus, check_model_matches_corpora


@pytest.fixture
def corpus_path(build_corpus, text_folder, monkeypatch) -> Path:
    """Return a corpus of several shards with several record batches each; one shard is empty."""
    monkeypatch.setattr(source, "MIN_PART_BYTES", 8 << 10)
    monkeypatch.setattr(shard_writer, "FLUSH_TOKENS", 1000)
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 2000)
    path = build_corpus(text_folder, "--heldout", "0.2")
    # A shard is empty if all of its documents were held out.
    manifest = json.loads((path / "manifest.json").read_text())
    entry = shard_writer.ShardWriter(path / "train" / "none.arrow", "uint16").close()
    assert entry["tokens"] == 0
    manifest["splits"]["train"]["shards"].insert(2, {"file": "train/none.arrow", **entry})
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def edit_manifest(path: Path, edit) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def shards_of(manifest: dict) -> list[dict]:
    return manifest["splits"]["train"]["shards"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_one_stream_of_tokens(corpus_path, split):
    documents = datasets.load_from_disk(str(corpus_path / split))["tokens"][:]
    truth = np.array(list(chain.from_iterable(documents)))
    begin = np.array([0, *accumulate(map(len, documents))][:-1])

    corpus = TokenCorpus(corpus_path, split)
    assert corpus.num_tokens == len(truth) and corpus.num_documents == len(documents)
    assert np.array_equal(corpus.tokens(0, len(truth)), truth)
    assert np.array_equal(corpus.document_starts(0, len(truth)), begin)
    rng = np.random.default_rng(0)
    cuts = rng.integers(0, len(truth) + 1, size=(500, 2))
    batch_edges = np.array(corpus._starts)
    near_edges = np.clip(batch_edges[:, None] + np.array([[-1, 1]]), 0, len(truth))
    for start, stop in np.sort(np.concatenate([cuts, near_edges, near_edges * [1, 0] + [[0, len(truth)]]]), axis=1):
        assert np.array_equal(corpus.tokens(start, stop), truth[start:stop])
        inside = begin[(begin >= start) & (begin < stop)]
        found = corpus.document_starts(start, stop)
        assert found.dtype == np.int64 and np.array_equal(found, inside)
    for position in (0, 1, len(truth)):
        assert len(corpus.tokens(position, position)) == 0 and len(corpus.document_starts(position, position)) == 0


def test_shards_are_not_read_at_the_start(corpus_path):
    """With terabytes it would take hours. Damage inside a shard is found when the shard is read."""
    assert len(TokenCorpus(corpus_path)._batches) > len(list((corpus_path / "train").glob("*.arrow"))) > 3
    for shard in (corpus_path / "train").glob("*.arrow"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    corpus = TokenCorpus(corpus_path)
    for read in (corpus.tokens, corpus.document_starts):
        with pytest.raises(CorruptData):
            read(0, 1)


def test_missing_and_corrupt_shards(corpus_path, tmp_path):
    def broken(name, damage) -> Path:
        copy = tmp_path / name
        shutil.copytree(corpus_path, copy)
        damage(copy)
        return copy

    shard = sorted((corpus_path / "train").glob("*.arrow"))[1].relative_to(corpus_path)

    def flip(copy):
        data = bytearray((copy / shard).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / shard).write_bytes(data)

    def lose_a_batch(copy):
        """Write a shard with another number of tokens, and its table; only the manifest disagrees."""
        rows = datasets.Dataset.from_file(str(copy / shard))["tokens"][1:]
        writer = shard_writer.ShardWriter(copy / shard, "uint16")
        writer.write(rows)
        entry = writer.close()
        kept = {name: entry[name] for name in ("size", "sha256", "table_sha256")}
        edit_manifest(copy, lambda m: next(s for s in shards_of(m) if s["file"] == str(shard)).update(kept))

    missing = broken("missing", lambda copy: (copy / shard).unlink())
    with pytest.raises(UserError, match=f"{shard} cannot be read .No such file.*copy the shard again"):
        TokenCorpus(missing)
    short = broken("short", lambda copy: (copy / shard).write_bytes((corpus_path / shard).read_bytes()[:-1]))
    with pytest.raises(UserError, match=f"{shard} has .*bytes, the manifest says .*copy the shard again"):
        TokenCorpus(short)
    flipped = TokenCorpus(broken("flipped", flip))
    with pytest.raises(CorruptData, match=f"{shard} is corrupt"):
        flipped.tokens(0, flipped.num_tokens)
    other_split = TokenCorpus(flipped.path, "heldout")
    other_split.tokens(0, other_split.num_tokens)
    with pytest.raises(UserError, match=rf"{shard} holds \d+ tokens, the manifest says"):
        TokenCorpus(broken("less", lose_a_batch))


def test_ids_outside_the_vocabulary(corpus_path):
    edit_manifest(corpus_path, lambda m: m["tokenizer"].update(vocab_size=200))
    with pytest.raises(
        UserError, match=r"train/data-\S+ holds token id 2\d\d, outside of its tokenizer's vocabulary of 200"
    ):
        TokenCorpus(corpus_path)


def test_missing_or_unfinished_corpus(tmp_path, build_corpus, text_folder):
    with pytest.raises(UserError, match=r"no manifest.json.*make one with `lrnn corpus`"):
        TokenCorpus(tmp_path / "none")
    (tmp_path / "some.partial").mkdir()
    with pytest.raises(UserError, match=r"some.partial is unfinished"):
        TokenCorpus(tmp_path / "some")
    path = build_corpus(text_folder)
    with pytest.raises(UserError, match=r"no split 'heldout'.*--heldout"):
        TokenCorpus(path, "heldout")
    with pytest.raises(UserError, match=r"no split 'test', it has \['train'\]"):
        TokenCorpus(path, "test")
    for version in (1, 99):
        edit_manifest(path, lambda m, version=version: m.update(format_version=version))
        with pytest.raises(UserError, match=f"format version {version}, this program reads 2; build it again"):
            TokenCorpus(path)
    for text, words in [
        ("{", "not JSON"),
        ("[]", "is not the manifest"),
        ('{"format": "x"}', "is not the manifest of a corpus"),
    ]:
        (path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=words):
            TokenCorpus(path)


def test_nothing_held_out(build_corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("one file")
    path = build_corpus(tmp_path / "text", "--heldout", "0.0001")
    assert TokenCorpus(path).num_documents == 1
    with pytest.raises(UserError, match="'heldout' is empty"):
        TokenCorpus(path, "heldout")


def test_check_model_matches_corpora(build_corpus, text_folder):
    first = TokenCorpus(build_corpus(text_folder, "--train-tokenizer", "320", out="first"))
    again = TokenCorpus(build_corpus(text_folder, "--tokenizer", str(first.path / "tokenizer"), out="again"))
    other = TokenCorpus(build_corpus(text_folder, "--train-tokenizer", "340", out="other"))

    check_model_matches_corpora(320, None, [first, again])
    check_model_matches_corpora(512, first.tokenizer_fingerprint, [first, again])
    with pytest.raises(UserError, match=r"vocabulary of 320.*vocab_size=319"):
        check_model_matches_corpora(319, None, [first])
    with pytest.raises(UserError, match=r"first and .*other were made with different tokenizers"):
        check_model_matches_corpora(512, None, [first, again, other])
    with pytest.raises(UserError, match=r"other: made with another tokenizer than the model's") as error:
        check_model_matches_corpora(512, first.tokenizer_fingerprint, [other])
    assert first.tokenizer_fingerprint[:12] in str(error.value) and other.tokenizer_fingerprint[:12] in str(error.value)
    assert first.fingerprint == again.fingerprint != other.fingerprint
