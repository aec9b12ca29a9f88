"""Reading a corpus: the stream of tokens as `datasets.load_from_disk` sees it, and what can be wrong with the files."""

import hashlib
import json
import shutil
from itertools import accumulate, chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from lrnn.errors import UserError
from lrnn.pretrain import shard_writer, sources
from lrnn.pretrain.corpus import TokenCorpus, check_model_matches_corpora


@pytest.fixture
def corpus_path(build_corpus, text_folder, monkeypatch) -> Path:
    """A corpus of several shards, each of several record batches, one shard of which is empty."""
    monkeypatch.setattr(sources, "MIN_PART_BYTES", 8 << 10)
    monkeypatch.setattr(shard_writer, "FLUSH_TOKENS", 1000)
    monkeypatch.setattr(shard_writer, "BATCH_CHARS", 2000)
    path = build_corpus(text_folder, "--heldout", "0.2")
    # What a shard looks like whose documents were all held out.
    manifest = json.loads((path / "manifest.json").read_text())
    shard = dict(manifest["splits"]["train"]["shards"][0])
    with pa.OSFile(str(path / "train" / "none.arrow"), "wb") as file:
        pa.ipc.new_stream(file, pa.schema([("tokens", pa.list_(pa.uint16()))])).close()
    data = (path / "train" / "none.arrow").read_bytes()
    shard |= {"file": "train/none.arrow", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shard |= {"tokens": 0, "documents": 0, "max_token_id": -1}
    manifest["splits"]["train"]["shards"].insert(2, shard)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def edit_manifest(path: Path, edit) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


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


def test_shards_are_mapped_not_read(corpus_path):
    before = pa.total_allocated_bytes()
    corpus = TokenCorpus(corpus_path)
    assert len(corpus._values) > len(corpus.manifest["splits"]["train"]["shards"]) > 3
    assert pa.total_allocated_bytes() - before < 1000
    assert not corpus.tokens(0, 10).flags.owndata and not corpus.tokens(0, 10).flags.writeable


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

    def garbage(copy):
        (copy / shard).write_bytes(b"\xff" * (copy / shard).stat().st_size)

    def lose_a_batch(copy):
        """A readable file of the right size and the wrong number of tokens."""
        size = (copy / shard).stat().st_size
        with pa.OSFile(str(copy / shard), "wb") as file:
            pa.ipc.new_stream(file, pa.schema([("tokens", pa.list_(pa.uint16()))])).close()
        with open(copy / shard, "ab") as file:
            file.write(b"\0" * (size - file.tell()))

    missing = broken("missing", lambda copy: (copy / shard).unlink())
    short = broken("short", lambda copy: (copy / shard).write_bytes((corpus_path / shard).read_bytes()[:-1]))
    for verify in (True, "size"):
        with pytest.raises(UserError, match=f"{shard}.*No such file"):
            TokenCorpus(missing, verify=verify)
        with pytest.raises(UserError, match=f"{shard}.*bytes, the manifest says"):
            TokenCorpus(short, verify=verify)
    flipped = broken("flipped", flip)
    with pytest.raises(UserError, match=f"{shard} is corrupt"):
        TokenCorpus(flipped)
    TokenCorpus(flipped, "heldout")  # the other split is whole
    with pytest.raises(UserError, match=f"{shard} is not a readable Arrow file"):
        TokenCorpus(broken("garbage", garbage), verify="size")
    with pytest.raises(UserError, match=f"{shard} holds 0 tokens, the manifest says"):
        TokenCorpus(broken("less", lose_a_batch), verify="size")


def test_ids_outside_of_the_vocabulary(corpus_path):
    edit_manifest(corpus_path, lambda m: m["tokenizer"].update(vocab_size=200))
    with pytest.raises(
        UserError, match=r"train/data-\S+ holds token id 2\d\d, outside of its tokenizer's vocabulary of 200"
    ):
        TokenCorpus(corpus_path)


def test_no_or_unfinished_corpus(tmp_path, build_corpus, text_folder):
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
    edit_manifest(path, lambda m: m.update(format_version=99))
    with pytest.raises(UserError, match="format version 99"):
        TokenCorpus(path)
    for text, words in [("{", "not JSON"), ("[]", "not that of a corpus"), ('{"format": "x"}', "not that of a corpus")]:
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
