"""The memory and speed of one setup, together."""

from dataclasses import dataclass
from functools import cached_property

from lrnn.pretrain.plan.collectives import Traffic
from lrnn.pretrain.plan.memory import Memory, memory_at_loss, peak_memory
from lrnn.pretrain.plan.setup import Setup
from lrnn.pretrain.plan.speed import Speed, step_speed

GB = 1e9
DAY_SECONDS = 24 * 3600
RESERVE = 0.05  # of a GPU's memory, for CUDA's context, NCCL's buffers, and blocks that PyTorch cannot fill


@dataclass(frozen=True)
class Estimate:
    """What a setup takes.

    Attributes:
        setup: the way the model is trained.
        capacity: bytes of memory of a GPU.
    """

    setup: Setup
    capacity: float

    @cached_property
    def memory(self) -> Memory:
        return peak_memory(self.setup)

    @cached_property
    def memory_at_loss(self) -> Memory:
        return memory_at_loss(self.setup)

    @cached_property
    def _speed(self) -> tuple[Speed, Traffic]:
        return step_speed(self.setup)

    @property
    def speed(self) -> Speed:
        return self._speed[0]

    @property
    def traffic(self) -> Traffic:
        return self._speed[1]

    @property
    def usable(self) -> float:
        """Bytes of memory that training can use."""
        return (1 - RESERVE) * self.capacity

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def need(self) -> str:
        """How much memory it takes and how much there is, for a message."""
        need, have = self.memory.total / GB, self.usable / GB
        return f"it takes {need:.1f} GB per GPU, and {have:.1f} of {self.capacity / GB:.0f} GB can be used"

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs."""
        return self.setup.tokens_per_step / self.speed.step

    def days(self, steps: int) -> float:
        """Return the days that so many steps take."""
        return steps * self.speed.step / DAY_SECONDS
