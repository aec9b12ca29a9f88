"""Test random integers: splitmix64 in Python's own integers, purity, uniformity, and disjoint seeds."""

import pytest
import torch
from chi_square import assert_distributed

from lrnn.errors import UserError
from lrnn.track.tasks import counter_rng
from lrnn.track.tasks.counter_rng import Field, integers, sample_keys, split_seed, words

MASK = 2**64 - 1


def reference_mix(x):
    """Apply splitmix64's output function to unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_field_zero_is_the_published_splitmix64_stream():
    # The first outputs for the seed 1234567, as many implementations list them.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = words(torch.tensor([1234567]), Field.LENGTH, torch.arange(4))
    assert [value & MASK for value in got.tolist()] == published


def test_keys_and_integers_against_python_integers():
    seeds = [0, 1, 2, 3, split_seed(7, "test"), split_seed(counter_rng.MAX_SEED - 1, "test")]
    gamma = 0x9E3779B97F4A7C15
    for seed in seeds:
        for index in (0, 1, 12345, counter_rng.MAX_INDEX - 1):
            base = reference_mix((seed // 4 + gamma) & MASK)
            key = reference_mix((base + gamma * ((seed % 4) * 2**62 + index)) & MASK)
            got = sample_keys(seed, torch.tensor([index]))
            assert got.item() & MASK == key
            for field in Field:
                for counter in (0, 1, 511, 2**32 - 1):
                    word = reference_mix((key + gamma * (field * 2**32 + counter + 1)) & MASK)
                    for bound in (1, 2, 3, 5, 120, 10**9):
                        assert integers(got, field, counter, bound).item() == (word >> 1) % bound


def test_mixing_is_a_bijection_of_a_sample_of_words():
    x = torch.arange(-100_000, 100_000)
    assert len(counter_rng.mix64(x).unique()) == len(x)


@pytest.mark.parametrize("bound", [2, 3, 5, 120])
def test_integers_are_uniform_alone_and_in_pairs(bound):
    draws = integers(sample_keys(4, torch.arange(2000))[:, None], Field.SYMBOL, torch.arange(100), bound)
    following = draws[:, ::2] * bound + draws[:, 1::2]  # the next position
    next_sample = draws[::2] * bound + draws[1::2]  # the next index
    for values, cells in ((draws, bound), (following, bound**2), (next_sample, bound**2)):
        assert_distributed(values.flatten().tolist(), {i: 1 / cells for i in range(cells)})


def test_fields_are_independent():
    keys = sample_keys(4, torch.arange(50_000))
    draws = [integers(keys, field, 0, 2) for field in Field]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs((a == b).double().mean().item() - 0.5) < 4 * 0.5 / 50_000**0.5


def test_splits_and_seeds_share_no_key():
    indices = torch.arange(100_000)
    seeds = [split_seed(seed, split) for seed in (0, 1, 2) for split in counter_rng.SPLITS]
    keys = torch.cat([sample_keys(seed, indices) for seed in seeds])
    assert len(keys.unique()) == len(keys)


def test_the_last_index_of_a_split_does_not_run_into_the_next():
    last = sample_keys(split_seed(9, "train"), torch.tensor([counter_rng.MAX_INDEX - 1]))
    first = sample_keys(split_seed(9, "validation"), torch.tensor([0]))
    assert last.item() != first.item()
    with pytest.raises(UserError, match="indices"):
        sample_keys(split_seed(9, "train"), torch.tensor([counter_rng.MAX_INDEX]))


def test_bad_seeds_splits_and_indices():
    for seed in (-1, counter_rng.MAX_SEED):
        with pytest.raises(UserError, match="seed"):
            split_seed(seed, "train")
    with pytest.raises(UserError, match="train, validation, test"):
        split_seed(0, "dev")
    with pytest.raises(UserError, match="seed"):
        sample_keys(-1, torch.arange(2))
    for indices in (torch.arange(2).float(), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([-1])):
        with pytest.raises(UserError, match="indices"):
            sample_keys(0, indices)
