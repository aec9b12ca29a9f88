"""The rule by which a loss counts as a spike.

The limit is the median of the last accepted losses plus `threshold` standard deviations. The deviation is estimated
from the median absolute deviation: unlike mean and variance, neither median is moved by a single outlier.
"""

import math
from statistics import median

import torch

from lrnn.pretrain.config import SpikeConfig

MAD_TO_SIGMA = 1.4826  # standard deviation / median absolute deviation of a normal distribution
SIGMA_FLOOR = 0.002  # of the median: on a plateau of almost equal losses, not every loss may be a spike


class SpikeRule:
    """The losses of the last steps, and the limit that follows from them.

    Args:
        settings: `window` is the number of losses that count; there is no limit before half of them are known.
        history: losses of earlier steps, oldest first. The attribute of the same name is what a checkpoint stores.
    """

    def __init__(self, settings: SpikeConfig, history: list[float]):
        self._settings = settings
        self.history = history[-settings.window :]

    @property
    def limit(self) -> float:
        """Return the largest loss that is no spike, in nats per token; infinity while too few losses are known."""
        if len(self.history) < max(1, self._settings.window // 2):
            return math.inf
        middle = median(self.history)
        sigma = MAD_TO_SIGMA * median(abs(loss - middle) for loss in self.history)
        limit = middle + self._settings.threshold * max(sigma, SIGMA_FLOOR * abs(middle))
        return torch.tensor(limit).item()  # In float32, as the loss that it is compared with on the device.

    def accept(self, loss: float) -> None:
        """Add the loss of a step that was applied."""
        self.history.append(loss)
        del self.history[: -self._settings.window]
