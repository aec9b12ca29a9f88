"""Test that micro-batches of a step do not depend on the number of processes."""

import pytest

from lrnn.errors import UserError
from lrnn.pretrain.batching import Batching


def test_micro_batches_do_not_depend_on_the_number_of_processes():
    alone = Batching(8, 2).own_samples(16, steps=2)
    assert alone.shape == (2, 4, 2) and alone.ravel().tolist() == list(range(16, 32))
    for world_size in (2, 4):
        ranks = [Batching(8, 2, rank, world_size) for rank in range(world_size)]
        for batching in ranks:
            own = batching.own_samples(16, steps=2)
            assert own.shape == (2, batching.accumulation_steps, 2)
            mine = [m for m in range(batching.micro_batches) if batching.is_own(m)]
            assert (own == alone[:, mine]).all()


def test_sizes_that_do_not_divide_are_refused():
    assert Batching(512, 8, 0, 16).accumulation_steps == 4
    for sizes in [(10, 4, 2), (24, 5, 2)]:
        with pytest.raises(UserError, match="not a multiple") as error:
            Batching(sizes[0], sizes[1], 0, sizes[2])
        assert all(str(n) in str(error.value) for n in sizes)
    with pytest.raises(UserError, match=r"global_batch_size=8 has too few samples for 5 processes.*at least 10"):
        Batching(8, 2, 0, 5)
    with pytest.raises(UserError, match="global_batch_size=8 is not a multiple of micro_batch_size=2 times 3"):
        Batching(8, 2, 0, 3)
