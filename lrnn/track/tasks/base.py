"""The interface of state-tracking tasks, and the layout shared by tasks with one answer per sequence."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrnn.errors import UserError
from lrnn.track.tasks.counter_rng import Field, integers, sample_keys

IGNORE = -100  # the label of positions without loss


class Batch(NamedTuple):
    input_ids: Tensor  # [B, L] int64, padded with the task's pad_id
    labels: Tensor  # [B, L] int64, the expected output at each position (already shifted) or IGNORE
    lengths: Tensor  # [B] int64, sizes as the papers count them


class Task(ABC):
    """A distribution over labelled sequences; a sample is a pure function of (seed, index, min_length, max_length).

    Answer class c has the id `first_answer_id + c` in the labels, c in 0..num_classes-1.
    """

    vocab_size: int
    num_classes: int
    first_answer_id: int
    pad_id: int
    answers_along_the_way = False  # whether a sequence has labels before its end
    # If sequences can be joined: [N, N] int64. [a, b] is the answer, as an id, to a sequence with answer a followed by
    # one with answer b, and 0 is the answer to the empty sequence.
    answer_table: Tensor | None = None

    def batch(
        self, seed: int, indices: Tensor, min_length: int, max_length: int, device: torch.device | str = "cpu"
    ) -> Batch:
        """Return the samples `indices` (`[B]` int64) of a seed of `counter_rng.split_seed`, padded to L = max_length.

        Lengths are uniform over `sizes(min_length, max_length)`.
        """
        sizes = torch.tensor(self.sizes(min_length, max_length), device=device)
        keys = sample_keys(seed, indices.to(device))
        lengths = sizes[integers(keys, Field.LENGTH, 0, len(sizes))]
        input_ids, labels = self.fill(keys, lengths, max_length)
        return Batch(input_ids, labels, lengths)

    @abstractmethod
    def sizes(self, min_length: int, max_length: int) -> list[int]:
        """Return the sizes of a range, repeated in proportion to probability. Raise UserError if there are none."""

    @abstractmethod
    def fill(self, keys: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return input ids and labels, `[B, width]` int64, of samples with these keys and lengths (`[B]` int64)."""

    @abstractmethod
    def answer_distribution(self, min_length: int, max_length: int) -> Tensor:
        """Return the exact probability of each answer class over all labelled positions, `[num_classes]` float64."""

    def majority_floor(self, min_length: int, max_length: int) -> float:
        """Return the exact, unscaled accuracy of always giving the most frequent answer."""
        return float(self.answer_distribution(min_length, max_length).max())


def size_range(task: str, min_length: int, max_length: int, smallest: int, step: int = 1, first: int = 0) -> list[int]:
    """Return the sizes in min_length..max_length that are `first` modulo `step`. Raise UserError if there are none."""
    if min_length > max_length:
        raise UserError(f"{task}: min_length {min_length} is above max_length {max_length}")
    if min_length < smallest:
        raise UserError(f"{task}: the smallest size is {smallest}, min_length is {min_length}")
    sizes = [size for size in range(min_length, max_length + 1) if size % step == first]
    if not sizes:
        kind = "odd" if (step, first) == (2, 1) else f"a multiple of {step}"
        raise UserError(f"{task}: sizes must be {kind}; there is none from {min_length} to {max_length}")
    return sizes


def check_integer(task: str, name: str, value: int, smallest: int, largest: int) -> int:
    """Return the value. Raise UserError unless it is an integer in smallest..largest."""
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise UserError(f"{task}: {name} must be an integer in {smallest}..{largest}, not {value!r}")
    return value


def check_bool(task: str, name: str, value: bool) -> bool:
    """Return the value. Raise UserError unless it is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{task}: {name} must be true or false, not {value!r}")
    return value


def one_answer(content: Tensor, content_lengths: Tensor, answer_ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input ids and labels `[B, L]` of a formal language: the answer's own slot and all after it are padding.

    The first `content_lengths` (`[B]`) positions of `content` (`[B, L]`) are kept. The last of them has the label
    `answer_ids` (`[B]`), all others have IGNORE.
    """
    positions = torch.arange(content.shape[1], device=content.device)
    input_ids = torch.where(positions < content_lengths[:, None], content, pad_id)
    labels = torch.where(positions == content_lengths[:, None] - 1, answer_ids[:, None], IGNORE)
    return input_ids, labels


def mean_over_sizes(by_size: dict[int, Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the mean of `by_size[size]` over the sizes, with their multiplicity."""
    return torch.stack([by_size[size] for size in sizes]).mean(0)
