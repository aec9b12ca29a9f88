"""The learning rate as a function of the step. It has no state, so nothing has to be saved or resumed."""

import math

from lrnn.pretrain.config import Config, ScheduleConfig


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate of the update that takes the model from `step` to `step + 1`; the first step is 0.

    It rises linearly to the peak over the warm-up. Then "cosine" decays to `min_lr_ratio` of the peak at the last
    step, and "wsd" stays at the peak and decays linearly over the last `decay_steps` (arXiv 2405.18392). The peak is
    `optim.lr` or that of the stage, and the schedule that of the run, over all of its steps, or that of the stage, over
    its own.
    """
    peak, first = config.optim.lr, 0
    for stage, steps in zip(config.stages, config.stage_steps, strict=True):
        if step < first + steps:
            peak = stage.lr or peak
            if stage.schedule is not None:
                return _rate(step - first, steps, peak, stage.schedule)
            break
        first += steps
    return _rate(step, config.steps, peak, config.schedule)


def _rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of a step among `steps`."""
    last = steps - 1
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "cosine":
        progress = (step - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        shape = 1.0 if schedule.decay_steps == 0 else min(1.0, (steps - step) / (schedule.decay_steps + 1))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)
