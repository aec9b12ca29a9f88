"""Test the numbers of `lrnn position`: likelihoods against transformers' own, documents, bins, bootstrap."""

import itertools
import json
import weakref

import numpy as np
import pytest
import torch
from position_models import TRAINED, make_model, text_of, write_heldout, write_texts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lrnn.errors import UserError
from lrnn.eval import documents, statistics
from lrnn.eval.position import bins as position_bins
from lrnn.eval.position import nll as position_nll
from lrnn.eval.position import report as position_report
from lrnn.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    return make_model(tiny_model, tmp_path_factory.mktemp("models") / "negative")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def texts(tmp_path):
    return write_heldout(tmp_path / "heldout.jsonl")


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lrnn", "llama"])
def test_likelihoods_equal_those_of_the_whole_sequence(kind, model, tiny_model):
    """Likelihoods equal transformers' loss, and are the same in pieces as in one pass, wherever the cuts are."""
    reader = model if kind == "lrnn" else AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.randint(250, (2, 201), generator=torch.Generator().manual_seed(0))
    (whole,) = position_nll.piecewise_nll(reader, ids, 10_000)
    assert whole.shape == (2, 200) and whole.dtype == torch.float32
    with torch.no_grad():
        assert whole.mean().item() == pytest.approx(reader(ids, labels=ids).loss.item(), rel=1e-5)
        log_p = torch.log_softmax(reader(ids).logits.double(), -1)
    torch.testing.assert_close(whole.double(), -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], atol=1e-5, rtol=0)
    for piece in (1, 3, 64, 67, 199, 200):
        pieces = list(position_nll.piecewise_nll(reader, ids, piece))
        assert max(part.shape[1] for part in pieces) <= piece
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)


def test_the_state_matters(model):
    """The test above would notice a state that is not passed on."""
    ids = torch.randint(250, (1, 101), generator=torch.Generator().manual_seed(0))
    (whole,) = position_nll.piecewise_nll(model, ids, 100)
    (second,) = position_nll.piecewise_nll(model, ids[:, 50:], 100)
    assert (second - whole[:, 50:]).abs().max() > 1e-3


class PeakMemory(TorchDispatchMode):
    """Records in `peak` the most bytes of tensors created in this mode that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if storage.nbytes() and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_does_not_grow_with_length(model, tokenizer, tmp_path):
    def peak(words, piece):
        path = write_texts(tmp_path / f"{words}.jsonl", [text_of(words, 0), text_of(words, 1)])
        found = documents.find_documents(path, tokenizer, 1, 10**6)
        edges = position_bins.log_edges(max(d.length for d in found), TRAINED, 4)
        with PeakMemory() as memory:
            position_nll.sum_by_bin(
                model, path, found, tokenizer, edges, piece=piece, batch_size=2, progress=lambda n: None
            )
        return memory.peak, found[0].length

    (short, n), (long, m), (whole, _) = peak(100, 128), peak(1600, 128), peak(1600, 10**6)
    assert m > 10 * n > 3 * 128
    assert long < 1.1 * short and whole > 5 * long


# --- documents --------------------------------------------------------------------------------------------------------


def test_only_long_documents_are_taken_and_from_their_beginning(texts, tokenizer):
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    found = documents.find_documents(texts, tokenizer, 512, 512)
    assert [d.length for d in found] == [512] * 3
    for document, line in zip(found, (1, 3, 6), strict=True):
        ids, predicted = documents.load_ids(texts, document, tokenizer)
        assert ids.tolist() == [0, *tokenizer.encode_batch([lines[line]])[0]][:513] and predicted.all()
    assert found[:2] == documents.find_documents(texts, tokenizer, 512, 512, limit=2)
    shorter = documents.find_documents(texts, tokenizer, 20, 512)
    assert len(shorter) == 7 and min(d.length for d in shorter) >= 20
    assert documents.find_documents(texts, tokenizer, shorter[0].length, 512)[0] == shorter[0], "exactly as long"
    ids, _ = documents.load_ids(texts, shorter[0], tokenizer)
    assert ids.tolist() == [0, *tokenizer.encode_batch([lines[0]])[0], 1] and len(ids) == shorter[0].length + 1
    with pytest.raises(UserError, match=r"0 of 7 documents have at least 9,999 tokens.*the longest have [12],\d+"):
        documents.find_documents(texts, tokenizer, 9999, 9999)


def test_joined_documents_hide_their_seams(tmp_path, tokenizer):
    path = write_texts(tmp_path / "short.jsonl", ["12", "345", "6", "7890", "12"])
    found = documents.join_documents(path, tokenizer, 7)
    assert [(len(d.offsets), d.length) for d in found] == [(2, 7), (2, 7)]
    ids, predicted = documents.load_ids(path, found[0], tokenizer)
    assert tokenizer.decode(ids) == "<s>12</s><s>345"
    assert predicted.tolist() == [True, True, True, False, True, True, True]
    assert tokenizer.decode(documents.load_ids(path, found[1], tokenizer)[0]) == "<s>6</s><s>7890"
    assert [len(d.offsets) for d in documents.join_documents(path, tokenizer, 9)] == [3, 2], "the first two lack one"
    with pytest.raises(UserError, match="22 tokens in all, do not join into two of 15 tokens"):
        documents.join_documents(path, tokenizer, 15)


# --- bins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_bins_partition_the_positions(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 3000))
    inner = rng.choice(np.arange(1, length + 1), size=rng.integers(1, min(length, 40) + 1), replace=False)
    edges = np.unique([0, *inner, length])
    bins = position_bins.bin_of(np.arange(1, length + 1), edges)
    expected = np.concatenate([np.full(edges[k + 1] - edges[k], k) for k in range(len(edges) - 1)])
    assert np.array_equal(bins, expected)


@pytest.mark.parametrize("seed", range(30))
def test_log_edges(seed):
    rng = np.random.default_rng(seed)
    length, anchor, per_octave = (int(2 ** rng.uniform(0, 15)), int(2 ** rng.uniform(0, 12)), int(rng.integers(1, 9)))
    edges = position_bins.log_edges(length, anchor, per_octave)
    assert edges[0] == 0 and edges[-1] == length and (np.diff(edges) > 0).all()
    assert anchor in edges or anchor > length
    inner = edges[1:-1]
    wide = inner[:-1] > 4 * per_octave  # here rounding to whole positions is small
    steps = np.log2(inner[1:] / inner[:-1])[wide]
    assert np.allclose(steps, 1 / per_octave, rtol=0.3)


def test_log_edges_of_whole_octaves():
    assert position_bins.log_edges(128, 32, 1).tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert position_bins.log_edges(5, 32, 4)[-3:].tolist() == [3, 4, 5]


@pytest.mark.parametrize(("piece", "batch_size"), [(7, 1), (64, 3), (10_000, 5)])
def test_sums_by_bin(model, texts, tokenizer, piece, batch_size):
    """For any pieces and padding, the sums equal those of a loop over the tokens of one document at a time."""
    found = documents.find_documents(texts, tokenizer, 20, 300)
    edges = position_bins.log_edges(300, TRAINED, 2)
    read = []
    sums, counts = position_nll.sum_by_bin(
        model, texts, found, tokenizer, edges, piece=piece, batch_size=batch_size, progress=read.append
    )
    for document, row, tokens in zip(found, sums, counts, strict=True):
        ids = torch.tensor(documents.load_ids(texts, document, tokenizer)[0][None], dtype=torch.int64)
        (nll,) = position_nll.piecewise_nll(model, ids, 10_000)
        expected = [nll[0, low:high].double().sum().item() for low, high in itertools.pairwise(edges)]
        np.testing.assert_allclose(row, expected, atol=1e-3)
        assert tokens.tolist() == [max(0, min(b, document.length) - a) for a, b in itertools.pairwise(edges)]
    assert sum(read) == counts.sum() == sum(d.length for d in found)


def test_seams_are_not_summed(model, tokenizer, tmp_path):
    path = write_texts(tmp_path / "short.jsonl", ["12", "345", "6", "7890", "12"])
    found = documents.join_documents(path, tokenizer, 7)
    _, counts = position_nll.sum_by_bin(
        model, path, found, tokenizer, np.arange(8), piece=3, batch_size=2, progress=lambda n: None
    )
    assert counts.tolist() == [[1, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]]


# --- bootstrap --------------------------------------------------------------------------------------------------------


def synthetic(n, seed, mean=2.0, bins=4):
    """Return sums [n, bins] and counts of documents of unequal length, with the mean `mean` over tokens in all bins."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(5, 50, size=(n, bins))
    values = mean + rng.normal(0, 0.3, size=(n, 1)) + rng.normal(0, 0.2, size=(n, bins))
    return values * counts, counts


def test_bootstrap_against_a_loop_over_documents(monkeypatch):
    sums, counts = synthetic(60, 0)
    curve = position_report.curves(["a"], sums[None], counts, resamples=4000)[0][0]
    rng = np.random.default_rng(99)
    draws = []
    for _ in range(4000):
        drawn = rng.integers(60, size=60)
        draws.append(sums[drawn].sum(0) / counts[drawn].sum(0))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(curve.mean, sums.sum(0) / counts.sum(0))
    np.testing.assert_allclose([curve.low, curve.high], [low, high], atol=0.01)
    assert (curve.high - curve.low).min() > 0.1
    again = statistics.resampled_means(sums[None], counts, 100, 0)
    monkeypatch.setattr(statistics, "BLOCK", 60 * 7)  # blocks of 7 draws
    # Matrix products of other sizes may differ in the last bit.
    np.testing.assert_allclose(statistics.resampled_means(sums[None], counts, 100, 0), again, rtol=1e-13)
    assert not np.array_equal(statistics.resampled_means(sums[None], counts, 100, 1), again)


def test_bands_cover_the_truth():
    covered = []
    for seed in range(300):
        sums, counts = synthetic(60, seed)
        curve = position_report.curves(["a"], sums[None], counts, resamples=300)[0][0]
        covered.append((curve.low < 2.0) & (curve.high > 2.0))
    assert 0.91 < np.mean(covered) < 0.97


def test_a_paired_band_sees_a_difference_smaller_than_either_band():
    sums, counts = synthetic(60, 0)
    noise = np.random.default_rng(1).normal(0, 0.002, size=sums.shape)
    means, (same, worse) = position_report.curves(
        ["a", "b", "c"], np.stack([sums, sums, sums + counts * (0.01 + noise)]), counts
    )
    assert same.name == "b - a" and not np.any([same.mean, same.low, same.high])
    assert (means[0].high - means[0].low).min() > 0.1
    assert (worse.low > 0.005).all() and (worse.low < 0.01).all() and (worse.high < 0.015).all()


@pytest.mark.filterwarnings("error")
def test_bins_that_few_documents_reach():
    sums, counts = synthetic(10, 0, bins=3)
    counts[1:, 1] = sums[1:, 1] = 0  # one document
    counts[3:, 2] = sums[3:, 2] = 0  # three: many draws have none of them
    curve = position_report.curves(["a"], sums[None], counts)[0][0]
    assert np.isnan(curve.low).tolist() == np.isnan(curve.high).tolist() == [False, True, False]
    assert np.isfinite(curve.mean).all() and curve.low[2] < curve.mean[2] < curve.high[2]
    broken = sums.copy()
    broken[0, 0] = np.inf
    curve, fine = position_report.curves(["a", "b"], np.stack([broken, sums]), counts)[0]
    assert np.isnan(curve.low).tolist() == [True, True, False] and np.isfinite(fine.low[0])
    rows = position_report.rows(curve, np.arange(4), counts, ppl=True)
    assert rows[0]["ppl"] is None and rows[1]["low"] is None and rows[1]["documents"] == 1
