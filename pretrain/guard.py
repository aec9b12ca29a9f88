"""Decide whether a step may reach the weights: losses that are not finite and spikes are found, recorded and answered.

`train_step` refuses an update on the device, by the limit that it is given before the step. The guard finds out
afterwards what happened. Every rank comes to the same answer, because all see the same loss.
"""

import math
from collections import Counter
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.spike_rule import SpikeRule
from lrnn.pretrain.step import Step

WORST = 4  # micro-batches with the largest losses, which a record lists


class Verdict(Enum):
    """The verdict on a step."""

    GOOD = "good"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


class Guard:
    """Judge every step of a run. All ranks call the same methods.

    Args:
        config: `spikes`, `max_skipped_steps` and `run_dir` are used.
        ranks: the processes of the run.
        history: losses of the last steps, from the run's progress.
        log: the run's log on the main process, None on others.
    """

    def __init__(self, config: Config, ranks: Ranks, history: list[float], log: MetricsLog | None):
        self._config, self._ranks, self._log = config, ranks, log
        self._skipped_in_a_row = 0
        self._rollbacks: Counter[str] = Counter()
        self._rule = SpikeRule(config.spikes, history)

    @property
    def history(self) -> list[float]:
        """Return the losses that the run's progress stores."""
        return self._rule.history

    @property
    def limit(self) -> float:
        """Return the loss above which the next update is refused. A loss that is not finite is always refused."""
        return math.inf if self._config.spikes.action == "log" else self._rule.limit

    def judge(self, number: int, applied: bool, step: Step, batches: list[MicroBatch]) -> Verdict:
        """Return what becomes of a step, and record it if it is bad.

        Args:
            number: number of the step.
            applied: whether the optimizer updated the weights.
            step: the result of the step.
            batches: this rank's micro-batches of the step.

        Raises:
            UserError: too many steps in a row were skipped. The message names the samples of this one.
        """
        loss = step.loss
        spike = math.isfinite(loss) and loss > self._rule.limit
        if applied:
            self._skipped_in_a_row = 0
            if spike:
                self._record("loss_spike", number, step, batches, "applied (spikes.action is log)")
            self._rule.accept(loss)
            return Verdict.GOOD
        self._skipped_in_a_row += 1
        event = "loss_spike" if spike else "skipped_step"
        samples = self._record(event, number, step, batches, "skipped")
        if self._skipped_in_a_row >= self._config.max_skipped_steps:
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row were skipped, the last one step {number} with loss {loss}: "
                f"its samples are {_shortened(samples)}; {self._config.run_dir}/metrics.jsonl lists all of them under "
                f"event {event}. Look at these samples, or lower optim.lr; the same command resumes the run from its "
                "newest checkpoint"
            )
        return Verdict.ROLL_BACK if spike and self._config.spikes.action == "rollback" else Verdict.SKIPPED

    def forget(self) -> None:
        """Forget the losses so far: in another stage, which has other data, they say nothing about the next ones."""
        self._rule = SpikeRule(self._config.spikes, [])

    def rolled_back(self, step: int, saved: Path | None, history: list[float]) -> None:
        """Note that the run returned to a checkpoint after the spike of `step`.

        Args:
            step: number of the step that was a spike.
            saved: the checkpoint; None if there was none to return to.
            history: losses of the last steps, from the run's progress after the return.

        Raises:
            UserError: the run returned to this checkpoint too often.
        """
        self._rule = SpikeRule(self._config.spikes, history)
        if saved is None:
            self._say(f"step {step}: there is no checkpoint to return to, the step is skipped instead")
            return
        self._rollbacks[saved.name] += 1
        if self._log is not None:
            self._log.write({"event": "rollback", "step": step, "to": str(saved)})
        self._say(f"back to {saved} after the spike of step {step}; the data in between is left out")
        if self._rollbacks[saved.name] > self._config.spikes.max_rollbacks:
            raise UserError(
                f"{self._rollbacks[saved.name]} rollbacks to {saved} (spikes.max_rollbacks is "
                f"{self._config.spikes.max_rollbacks}): the loss spikes on other data too; the samples are in "
                f"{self._config.run_dir}/metrics.jsonl under event loss_spike. Lower optim.lr, or remove that "
                "checkpoint to resume from an older one"
            )

    def _record(self, event: str, number: int, step: Step, batches: list[MicroBatch], outcome: str) -> list[int]:
        """Record the samples of a step, and the micro-batches with the largest losses. Return all samples, sorted."""
        losses = step.micro_batch_losses.tolist()
        own = [(loss, batch.sample_indices.tolist()) for loss, batch in zip(losses, batches, strict=True)]
        found = list(chain.from_iterable(self._ranks.gather(own)))
        found.sort(key=lambda item: item[0] if math.isfinite(item[0]) else math.inf, reverse=True)
        samples = sorted(chain.from_iterable(indices for _, indices in found))
        worst = [{"loss": loss, "samples": indices} for loss, indices in found[:WORST]]
        loss = step.loss
        if self._log is not None:
            record: dict[str, Any] = {"event": event, "step": number, "loss": str(loss), "outcome": outcome}
            self._log.write({**record, "limit": self._rule.limit, "worst": worst, "samples": samples})
        what = f"loss {loss:.4f} is a spike (limit {self._rule.limit:.4f})"
        if event == "skipped_step":
            what = f"loss {loss} or its gradient is not finite"
        self._say(
            f"step {number} {outcome}: {what}; samples {_shortened(samples)}, the largest loss {worst[0]['loss']:.4f} "
            f"in {_shortened(found[0][1])}"
        )
        return samples

    def _say(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)


def _shortened(samples: list[int]) -> str:
    """Format sample numbers for a message: only the first few of many."""
    return f"{', '.join(map(str, samples[:16]))}{', ...' if len(samples) > 16 else ''}"
