"""Test the registry, the properties of every task, and the scores."""

import math

import pytest
import torch

from lrnn.errors import UserError
from lrnn.track.metrics import prefix_accuracy, scaled_accuracy
from lrnn.track.tasks.counter_rng import SPLITS, split_seed
from lrnn.track.tasks.registry import TASKS, make_task

EVERY = [
    *((name, {}) for name in TASKS),
    ("modular_arithmetic_brackets", {"operators": "+-", "modulus": 7}),
    ("group_word", {"group": "Z60"}),
    ("group_word", {"variant": "only_swaps"}),
    ("group_word", {"variant": "four_tokens"}),
]
every_task = pytest.mark.parametrize(("name", "parameters"), EVERY, ids=lambda value: str(value))


@every_task
def test_a_sample_is_the_same_in_any_batch(name, parameters):
    task = make_task(name, **parameters)
    indices = torch.arange(60)
    whole = task.batch(8, indices, 5, 50)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for chosen in (shuffled, torch.tensor([17]), torch.tensor([3, 3, 59])):
        for part, of_whole in zip(make_task(name, **parameters).batch(8, indices[chosen], 5, 50), whole, strict=True):
            assert torch.equal(part, of_whole[chosen])
    for part in task.batch(8, indices[:0], 5, 50):
        assert len(part) == 0


@every_task
def test_splits_share_no_sample(name, parameters):
    task = make_task(name, **parameters)
    seen = set()
    for split in SPLITS:
        batch = task.batch(split_seed(3, split), torch.arange(2000), 95, 101)
        seen |= {tuple(ids) for ids in batch.input_ids.tolist()}
    assert len(seen) == 2000 * len(SPLITS)


@every_task
def test_ids_are_in_the_vocabulary_and_labels_are_answers(name, parameters):
    task = make_task(name, **parameters)
    batch = task.batch(0, torch.arange(500), 8, 40)
    answers = batch.labels[batch.labels != -100] - task.first_answer_id
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < task.vocab_size
    assert answers.min() >= 0 and answers.max() < task.num_classes
    assert len(answers.unique()) == task.num_classes
    assert (batch.labels != -100).any(1).all()


def test_unknown_names_and_parameters_name_the_nearest():
    with pytest.raises(UserError, match=r"did you mean parity\? valid: parity, even_pairs"):
        make_task("party")
    with pytest.raises(UserError, match=r"no parameter 'modulo'; did you mean modulus\? valid: modulus, operators"):
        make_task("modular_arithmetic_brackets", modulo=5)
    with pytest.raises(UserError, match="no parameter 'bits'; valid: none"):
        make_task("parity", bits=3)


def test_scaled_accuracy():
    assert scaled_accuracy(0.5, 2) == 0
    assert scaled_accuracy(1.0, 5) == 1
    assert scaled_accuracy(0.6, 5) == pytest.approx(0.5)
    assert scaled_accuracy(0.0, 2) == -1
    with pytest.raises(UserError, match="2 classes"):
        scaled_accuracy(1.0, 1)


def test_a_sequence_counts_only_while_everything_before_was_right():
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, -100], [5, 6, 7, -100]])
    predictions = torch.tensor([[1, 2, 3, 4], [1, 0, 3, 4], [1, 2, 3, 9], [0, 6, 7, 9]])
    assert prefix_accuracy(predictions, labels).tolist() == [3 / 4, 2 / 4, 2 / 4, 1 / 2]


def test_positions_without_labels_neither_count_nor_break_a_sequence():
    labels = torch.tensor([[-100, 1, -100, 2], [-100, 1, -100, 2]])
    predictions = torch.tensor([[7, 1, 7, 2], [7, 0, 7, 2]])
    first, second, third, fourth = prefix_accuracy(predictions, labels).tolist()
    assert math.isnan(first) and math.isnan(third) and (second, fourth) == (0.5, 0.5)


def test_prefix_accuracy_against_loops():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40, 12), generator=generator)
    predictions = torch.where(torch.rand(40, 12, generator=generator) < 0.1, 5, labels)
    labels[torch.rand(40, 12, generator=generator) < 0.3] = -100
    got = prefix_accuracy(predictions, labels).tolist()
    for t in range(12):
        with_label = [b for b in range(40) if labels[b, t] != -100]
        right = [b for b in with_label if all(labels[b, s] in (-100, predictions[b, s]) for s in range(t + 1))]
        assert got[t] == len(right) / len(with_label)


def test_prefix_accuracy_refuses_other_shapes():
    with pytest.raises(UserError, match="shapes"):
        prefix_accuracy(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="shapes"):
        prefix_accuracy(torch.zeros(3), torch.zeros(3))
