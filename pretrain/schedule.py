"""The learning rate as a function of the step. It has no state, so nothing has to be saved or resumed."""

import math

from lrnn.pretrain.config import Config


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of the update that takes the model from `step` to `step + 1`; the first step is 0.

    It rises linearly to `optim.lr` over the warm-up. Then "cosine" decays to `min_lr_ratio` of the peak at the last
    step, and "wsd" stays at the peak and decays linearly over the last `decay_steps` (arXiv 2405.18392).
    """
    peak, schedule, last = config.optim.lr, config.schedule, config.steps - 1
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        shape = 1.0 if schedule.decay_steps == 0 else min(1.0, (config.steps - step) / (schedule.decay_steps + 1))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)
