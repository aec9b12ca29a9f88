import numpy as np
import pytest

from lrnn.errors import UserError
from lrnn.pretrain.data.order import BLOCK, MixedOrder, window_index


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 16, 17, 63, 64, 65, 97, 1000, 4096, 4097, 65537])
def test_window_index_is_a_permutation(n):
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (2**63, 12345)]:
        assert np.array_equal(np.sort(window_index(seed, epoch, np.arange(n), n)), np.arange(n))


def test_window_index_is_pointwise():
    n = 1009
    whole = window_index(7, 3, np.arange(n), n)
    assert [int(window_index(7, 3, i, n)) for i in range(0, n, 50)] == whole[::50].tolist()
    epochs = np.array([0, 3, 3, 9])
    mixed = window_index(7, epochs, np.array([4, 5, 6, 4]), n)
    assert mixed.tolist() == [int(window_index(7, int(e), i, n)) for e, i in zip(epochs, [4, 5, 6, 4], strict=True)]


def test_window_index_reaches_far():
    n = 10**12 + 39  # far more than memory would hold
    i = np.array([0, 1, n // 2, n - 1])
    found = window_index(0, 0, i, n)
    assert len(set(found.tolist())) == 4 and found.min() >= 0 and found.max() < n


def test_epochs_and_seeds_give_unrelated_orders():
    n = 5000
    orders = [window_index(seed, epoch, np.arange(n), n) for seed in range(4) for epoch in range(4)]
    orders.append(np.arange(n))
    for a in range(len(orders)):
        for b in range(a):
            # Unrelated permutations agree in one place on average (Poisson), and correlate by 1 / sqrt(n).
            assert (orders[a] == orders[b]).sum() < 10
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 5 / np.sqrt(n)


def test_order_looks_random():
    n = 100_003
    order = window_index(0, 0, np.arange(n), n)
    # Neighbours are not correlated, and differ by one no more often than by chance (2 of n pairs).
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(n)
    assert (np.abs(np.diff(order)) == 1).sum() < 15
    # Any stretch covers the range evenly, by chi-squared with 99 degrees of freedom.
    counts = np.histogram(order[:10_000], bins=100, range=(0, n))[0]
    assert 50 < ((counts - 100) ** 2 / 100).sum() < 170


def test_small_permutations_are_all_reached():
    seen = {tuple(window_index(seed, 0, np.arange(4), 4)) for seed in range(2000)}
    assert len(seen) == 24


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 1, 1], [5, 1, 1, 1e-2], [0.1] * 10, [1000.0, 1, 2, 3]])
def test_mixed_counts_never_drift(weights):
    order = MixedOrder([101 + c for c in range(len(weights))], weights, seed=3)
    exact = np.array(weights) / sum(weights)
    for block in [0, 1, 2, 10, 1000, 10**6]:
        # The k-th sample of a corpus in a block tells how many samples of that corpus came before it.
        samples = np.arange(block * BLOCK, (block + 1) * BLOCK)
        corpus, epoch, _ = order(samples)
        for c, share in enumerate(exact):
            given = (corpus == c).sum()
            assert abs(given - share * BLOCK) < 2
            done = share * block * BLOCK
            assert abs(epoch[corpus == c].min() - done / (101 + c)) < 1 + 2 / (101 + c)
    corpus, _, _ = order(np.arange(40 * BLOCK))
    for blocks in range(1, 41):
        counts = np.bincount(corpus[: blocks * BLOCK], minlength=len(weights))
        assert np.abs(counts - exact * blocks * BLOCK).max() < 2


@pytest.mark.parametrize("samples", [0, 1, BLOCK - 1, BLOCK, BLOCK + 7, 5 * BLOCK, 5 * BLOCK + 1000])
@pytest.mark.parametrize("windows", [[30], [30, 500, 7]])
def test_counts_are_those_of_the_samples(windows, samples):
    order = MixedOrder(windows, list(range(1, len(windows) + 1)), seed=3)
    corpus, _, _ = order(np.arange(samples))
    assert order.counts(samples).tolist() == [int((corpus == c).sum()) for c in range(len(windows))]


def test_mixed_windows_are_seen_once_per_epoch():
    num_windows = [700, 33]
    order = MixedOrder(num_windows, [3.0, 1.0], seed=5)
    corpus, epoch, window = order(np.arange(5 * BLOCK))
    for c, n in enumerate(num_windows):
        for e in range(epoch[corpus == c].max()):  # the last epoch may be unfinished
            assert np.array_equal(np.sort(window[(corpus == c) & (epoch == e)]), np.arange(n))
    first, second = (window[(corpus == 1) & (epoch == e)] for e in (0, 1))
    assert not np.array_equal(first, second)


def test_mixed_order_is_mixed_within_a_block():
    corpus, _, _ = MixedOrder([50, 50], [0.5, 0.5], seed=0)(np.arange(BLOCK))
    first_half = (corpus[: BLOCK // 2] == 0).sum()
    assert abs(first_half - BLOCK / 4) < 5 * np.sqrt(BLOCK) / 4


def test_mixed_order_is_pure():
    def make(seed=9):
        return MixedOrder([1234, 77, 5], [1, 2, 3], seed)

    samples = np.arange(3 * BLOCK)
    whole = make()(samples)
    picked = np.random.default_rng(0).permutation(samples)[:500]
    again = make()(picked)
    for a, b in zip(whole, again, strict=True):
        assert np.array_equal(a[picked], b)
    assert not np.array_equal(whole[2], make(10)(samples)[2])


def test_a_single_corpus_has_whole_epochs():
    _, epoch, window = MixedOrder([10], [2.0], seed=0)(np.arange(30))
    assert epoch.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert sorted(window[10:20].tolist()) == list(range(10))


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e-5]])
def test_bad_weights(weights):
    with pytest.raises(UserError, match="weights"):
        MixedOrder([10, 10], weights, seed=0)
