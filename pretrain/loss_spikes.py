"""Which losses are out of line with those before: the rule by which a step is kept from the weights.

The limit is the median of the last accepted losses plus `threshold` standard deviations, where the deviation is
estimated from the median absolute deviation: unlike mean and variance, neither is moved by a single outlier.
"""

import math
from statistics import median

import torch

from lrnn.pretrain.config import SpikeConfig

MAD_TO_SIGMA = 1.4826  # standard deviation / median absolute deviation of a normal distribution
SIGMA_FLOOR = 0.002  # of the median: a plateau of almost equal losses must not make everything a spike


class LossSpikes:
    """The losses of the last steps, and the limit that they set.

    Args:
        settings: `window` losses are looked back on; there is no limit before half of them are there.
        history: losses of an earlier run, oldest first; what `history` holds then goes into the checkpoint.
    """

    def __init__(self, settings: SpikeConfig, history: list[float]):
        self._settings = settings
        self.history = history[-settings.window :]

    @property
    def limit(self) -> float:
        """The largest loss that is no spike, in nats a token; infinite while too few are known."""
        if len(self.history) < max(1, self._settings.window // 2):
            return math.inf
        middle = median(self.history)
        sigma = MAD_TO_SIGMA * median(abs(loss - middle) for loss in self.history)
        limit = middle + self._settings.threshold * max(sigma, SIGMA_FLOOR * abs(middle))
        return torch.tensor(limit).item()  # in float32, as the loss that it is compared with on the device

    def accept(self, loss: float) -> None:
        """Add the loss of a step that was applied."""
        self.history.append(loss)
        del self.history[: -self._settings.window]
