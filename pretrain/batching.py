"""How the samples of a step are spread over micro-batches and processes."""

from dataclasses import dataclass

import numpy as np

from lrnn.errors import UserError


@dataclass(frozen=True)
class Batching:
    """The batch sizes of a run and the place of this process among all.

    A step's samples are cut into micro-batches of consecutive samples, and micro-batch m goes to rank
    `m % world_size`. The content of a micro-batch therefore does not depend on the number of processes.

    Args:
        global_batch_size: samples per step, over all processes.
        micro_batch_size: samples per micro-batch, which is one forward pass of one process.
        rank: number of this process, below `world_size`.
        world_size: number of processes.

    Raises:
        UserError: a step has fewer samples than the processes take at once, or the sizes do not divide.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        at_once = self.micro_batch_size * self.world_size
        if at_once > self.global_batch_size:
            raise UserError(
                f"global_batch_size={self.global_batch_size} has too few samples for {self.world_size} processes with "
                f"micro_batch_size={self.micro_batch_size}: at least {at_once}, or fewer processes"
            )
        if self.global_batch_size % at_once:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size} times {self.world_size} processes"
            )

    @property
    def accumulation_steps(self) -> int:
        """Return the number of micro-batches per step and process."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches per step over all processes."""
        return self.global_batch_size // self.micro_batch_size

    def is_own(self, micro_batch: int) -> bool:
        """Return whether this rank computes micro-batch number `micro_batch` of a step."""
        return micro_batch % self.world_size == self.rank

    def own_samples(self, first: int, steps: int = 1) -> np.ndarray:
        """Return the numbers of this rank's samples in the `steps` steps that begin at sample `first`.

        Returns:
            [steps, accumulation_steps, micro_batch_size] int64.
        """
        numbers = np.arange(first, first + steps * self.global_batch_size, dtype=np.int64)
        return numbers.reshape(steps, self.micro_batches, self.micro_batch_size)[:, self.rank :: self.world_size]
