"""Compare batches with a slow and simple reference, made from the documents as `datasets` reads them."""

from itertools import chain, islice

import datasets
import numpy as np
import pytest
import torch

from lrnn.errors import UserError
from lrnn.kernels.reference.documents import longest_document
from lrnn.pretrain.batching import Batching
from lrnn.pretrain.corpus import shard_writer, source
from lrnn.pretrain.corpus.reader import TokenCorpus
from lrnn.pretrain.data import loader as loader_module
from lrnn.pretrain.data.heldout import heldout_batches
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.data.micro_batch import model_inputs
from lrnn.pretrain.data.order import MixedOrder
from lrnn.pretrain.data.samples import CorpusData

SEQ_LEN = 64


@pytest.fixture
def corpora(build_corpus, text_folder, monkeypatch) -> list[TokenCorpus]:
    """Return two corpora of one tokenizer, in several shards and record batches."""
    monkeypatch.setattr(source, "MIN_PART_BYTES", 8 << 10)
    monkeypatch.setattr(shard_writer, "FLUSH_TOKENS", 1000)
    paths = [
        build_corpus(text_folder, "--include", glob, "--heldout", "0.3", out=name)
        for name, glob in [("a", "d0/*"), ("b", "d[12]/*")]
    ]
    return [TokenCorpus(path) for path in paths]


def truth_of(corpus: TokenCorpus, window: int) -> tuple[list[int], list[int], list[int]]:
    """Return the inputs and labels of a window, and the positions at which a document starts."""
    documents = datasets.load_from_disk(str(corpus.path / corpus.split))["tokens"][:]
    flat = list(chain.from_iterable([(id_, place) for place, id_ in enumerate(document)] for document in documents))
    cut = flat[window * SEQ_LEN : (window + 1) * SEQ_LEN + 1]
    assert len(cut) == SEQ_LEN + 1
    inputs = [id_ for id_, _ in cut[:-1]]
    labels = [-100 if place == 0 else id_ for id_, place in cut[1:]]
    return inputs, labels, [i for i, (_, place) in enumerate(cut[:-1]) if place == 0]


@pytest.mark.parametrize("reset", [False, True])
def test_batches(corpora, reset):
    weights = [1.0, 2.0]
    data = CorpusData(corpora, weights, SEQ_LEN, seed=4, reset_at_document_boundaries=reset)
    windows = [(corpus.num_tokens - 1) // SEQ_LEN for corpus in corpora]
    assert data.num_windows == sum(windows)
    indices = np.array([3, 0, 999, 12345, 70, 71, 72])
    which, _, window = MixedOrder(windows, weights, 4)(indices)
    assert set(which) == {0, 1}
    batch = data.batch(indices)
    starts = []
    for row, (c, w) in enumerate(zip(which, window, strict=True)):
        inputs, labels, begin = truth_of(corpora[c], w)
        assert batch.input_ids[row].tolist() == inputs
        assert batch.labels[row].tolist() == labels
        starts += sorted({0, *begin})
        starts[len(starts) - len({0, *begin}) :] = [row * SEQ_LEN + s for s in sorted({0, *begin})]
    assert (batch.labels == -100).any()
    assert batch.input_ids.dtype == batch.labels.dtype == batch.sample_indices.dtype == torch.int64
    assert batch.sample_indices.tolist() == indices.tolist()
    if reset:
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [*starts, len(indices) * SEQ_LEN]
    else:
        assert batch.cu_seqlens is None


def test_every_window_and_every_boundary(corpora):
    """Over one epoch of one corpus, each token is a label once, except the first of each document."""
    (corpus, _) = corpora
    data = CorpusData([corpus], [1.0], SEQ_LEN, seed=0, reset_at_document_boundaries=True)
    batch = data.batch(np.arange(data.num_windows))
    documents = datasets.load_from_disk(str(corpus.path / "train"))["tokens"][:]
    used = data.num_windows * SEQ_LEN + 1
    flat = list(chain.from_iterable(documents))[:used]
    firsts = np.cumsum([0, *map(len, documents)])
    order = MixedOrder([data.num_windows], [1.0], 0)(np.arange(data.num_windows))[2]
    labels = batch.labels[np.argsort(order)].flatten().numpy()
    assert np.array_equal(np.flatnonzero(labels == -100) + 1, firsts[(firsts > 0) & (firsts < used)])
    assert np.array_equal(labels[labels != -100], np.delete(flat[1:], firsts[(firsts > 0) & (firsts < used)] - 1))
    lengths = np.diff(batch.cu_seqlens.numpy())
    moved = model_inputs(batch, torch.device("cpu"))["cu_seqlens"]
    assert longest_document(moved, SEQ_LEN) == lengths.max()  # for attention on a GPU
    assert lengths.min() >= 1 and lengths.max() <= SEQ_LEN and lengths.sum() == batch.input_ids.numel()


def test_a_document_that_starts_where_the_next_window_does(corpora):
    (corpus, _) = corpora
    documents = datasets.load_from_disk(str(corpus.path / "train"))["tokens"][:]
    length = len(documents[0])
    assert corpus.num_tokens > 2 * length
    data = CorpusData([corpus], [1.0], length, seed=0, reset_at_document_boundaries=True)
    window = MixedOrder([data.num_windows], [1.0], 0)(np.arange(data.num_windows))[2].tolist()
    batch = data.batch(np.array([window.index(0), window.index(1)]))
    assert batch.labels[0].tolist() == [*documents[0][1:], -100]
    assert batch.input_ids[1, 0] == documents[1][0] and batch.labels[1, 0] == documents[1][1]
    assert batch.cu_seqlens[:2].tolist() == [0, length]


def steps_of(data, ranks, start=0, count=3, g=24, micro=2):
    """Return the micro-batches of all ranks by step, in the order of their samples."""
    loaders = [Loader(data, Batching(g, micro, rank, ranks), start_sample=start) for rank in range(ranks)]
    try:
        steps = []
        for parts in islice(zip(*loaders, strict=True), count):
            assert len({len(part) for part in parts}) == 1
            steps.append(sorted(chain.from_iterable(parts), key=lambda b: int(b.sample_indices[0])))
        return steps
    finally:
        for loader in loaders:
            loader.close()


def same(a, b) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "labels", "cu_seqlens", "sample_indices")
    )


def test_ranks_share_the_same_micro_batches(corpora):
    data = CorpusData(corpora, [1, 1], SEQ_LEN, seed=1, reset_at_document_boundaries=True)
    one = steps_of(data, 1)
    for step, batches in enumerate(one):
        assert torch.cat([b.sample_indices for b in batches]).tolist() == list(range(24 * step, 24 * step + 24))
        assert same(batches[0], data.batch(np.array([24 * step, 24 * step + 1])))
    for ranks in (2, 3, 4, 12):
        for a, b in zip(one, steps_of(data, ranks), strict=True):
            assert len(a) == len(b) == 12 and all(map(same, a, b))


def test_micro_batches_go_round_the_ranks(corpora):
    data = CorpusData(corpora, [1, 1], SEQ_LEN, seed=1)
    with Loader(data, Batching(12, 2, rank=1, world_size=3)) as loader:
        assert [b.sample_indices.tolist() for b in next(loader)] == [[2, 3], [8, 9]]
        assert [b.sample_indices.tolist() for b in next(loader)] == [[14, 15], [20, 21]]


def test_the_position_is_one_number(corpora, monkeypatch):
    data = CorpusData(corpora, [1, 1], SEQ_LEN, seed=1, reset_at_document_boundaries=True)
    whole = steps_of(data, 1, count=6)
    monkeypatch.setattr(loader_module, "LOCATE_SAMPLES", 50)  # another division of the work
    for ranks in (1, 2):
        for a, b in zip(whole[2:], steps_of(data, ranks, start=48, count=4), strict=True):
            assert all(map(same, a, b))


def test_too_little_text(build_corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("0123456789")
    corpus = TokenCorpus(build_corpus(tmp_path / "text"))
    n = corpus.num_tokens
    CorpusData([corpus], [1.0], n - 1, seed=0).batch(np.array([0]))
    with pytest.raises(UserError, match=f"has {n} tokens, too few for one sample of seq_len={n} .which takes {n + 1}"):
        CorpusData([corpus], [1.0], n, seed=0)
    with pytest.raises(UserError, match="too few for one sample"):
        heldout_batches([corpus], n, Batching(1, 1), 1)
    with pytest.raises(UserError, match="2 processes, but the corpora have only 1 samples"):
        Loader(CorpusData([corpus], [1.0], n - 1, seed=0), Batching(2, 1, 0, 2))


def test_fingerprint_covers_everything_that_decides_the_samples(corpora):
    base = CorpusData(corpora, [1, 2], SEQ_LEN, seed=0)
    assert (
        base.fingerprint == CorpusData(corpora, [1, 2], SEQ_LEN, seed=0, reset_at_document_boundaries=True).fingerprint
    )
    for other in [
        CorpusData(corpora, [2, 1], SEQ_LEN, seed=0),
        CorpusData(corpora, [1, 2], 32, seed=0),
        CorpusData(corpora, [1, 2], SEQ_LEN, seed=1),
        CorpusData(corpora[::-1], [1, 2], SEQ_LEN, seed=0),
    ]:
        assert base.fingerprint != other.fingerprint


# --- held-out batches -------------------------------------------------------------------------------------------------


def held(corpora, ranks, max_batches, micro=2):
    batchings = [Batching(micro * ranks, micro, rank, ranks) for rank in range(ranks)]
    return [
        list(heldout_batches(corpora, SEQ_LEN, batching, max_batches, reset_at_document_boundaries=True))
        for batching in batchings
    ]


def test_heldout_batches(corpora):
    heldout = [TokenCorpus(corpus.path, "heldout") for corpus in corpora]
    windows = [(corpus.num_tokens - 1) // SEQ_LEN for corpus in heldout]
    assert min(windows) >= 2 and windows[0] != windows[1]

    (few,) = held(heldout, 1, max_batches=2)
    expected = [truth_of(heldout[c], w) for w, c in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert [row for b in few for row in b.input_ids.tolist()] == [inputs for inputs, _, _ in expected]
    assert [row for b in few for row in b.labels.tolist()] == [labels for _, labels, _ in expected]

    (all_of_them,) = held(heldout, 1, max_batches=10**6)
    assert sum(int((b.sample_indices >= 0).sum()) for b in all_of_them) == sum(windows)

    def real_rows(ranks, max_batches):
        per_rank = held(heldout, ranks, max_batches)
        assert len({len(batches) for batches in per_rank}) == 1 and len(per_rank[0]) >= 1
        rows = []
        for batch in chain.from_iterable(per_rank):
            assert batch.input_ids.shape == batch.labels.shape == (2, SEQ_LEN)
            for i, inputs, labels in zip(batch.sample_indices.tolist(), batch.input_ids, batch.labels, strict=True):
                if i < 0:
                    assert (labels == -100).all()
                else:
                    rows.append((i, inputs.tolist(), labels.tolist()))
        return sorted(rows)

    for max_batches in (1, 3, 10**6):
        for ranks in (2, 3, 64):
            assert real_rows(ranks, max_batches) == real_rows(1, max_batches)


# --- the thread -------------------------------------------------------------------------------------------------------
