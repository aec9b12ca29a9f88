"""Steps that are kept from the weights: not finite, or a spike of the loss. What is done about them, and the record.

`train_step` refuses an update on the device, by the limit that is given here before the step. Here it is found out
afterwards what happened; every rank comes to the same answer, since all see the same loss.
"""

import math
from collections import Counter
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.data.loader import MicroBatch
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.loss_spikes import LossSpikes
from lrnn.pretrain.metrics.log import MetricsLog

WORST = 4  # micro-batches that are named first


class Verdict(Enum):
    GOOD = "good"
    SKIPPED = "skipped"
    ROLL_BACK = "roll back"


class BadSteps:
    """Judges every step of a run.

    Args:
        config: `spikes` and `max_skipped_steps` count here.
        history: the losses that the run's progress holds.
        log: on the main process.
    """

    def __init__(self, config: Config, ranks: Ranks, history: list[float], log: MetricsLog | None):
        self._config, self._ranks, self._log = config, ranks, log
        self._in_a_row = 0
        self._rollbacks: Counter[str] = Counter()
        self.look_back_on(history)

    def look_back_on(self, history: list[float]) -> None:
        """Judge by these losses from now on."""
        self._spikes = LossSpikes(self._config.spikes, history)

    @property
    def history(self) -> list[float]:
        """The losses to keep in the run's progress."""
        return self._spikes.history

    @property
    def limit(self) -> float:
        """The loss above which the next step's update is to be refused; a loss that is not finite always is."""
        return math.inf if self._config.spikes.action == "log" else self._spikes.limit

    def judge(self, step: int, applied: bool, loss: float, parts: Tensor, micro_batches: list[MicroBatch]) -> Verdict:
        """Say what the step was; to be called on all ranks.

        Args:
            step: number of the step.
            applied: whether the optimizer updated the weights.
            loss: mean over the step's labels, nats.
            parts: mean losses of this rank's `micro_batches`, a vector.

        Raises:
            UserError: too many steps in a row were skipped. The message names the samples of this one.
        """
        spike = math.isfinite(loss) and loss > self._spikes.limit
        if applied:
            self._in_a_row = 0
            if spike:
                self._record("loss_spike", step, loss, parts, micro_batches, "applied (spikes.action is log)")
            self._spikes.accept(loss)
            return Verdict.GOOD
        self._in_a_row += 1
        event = "loss_spike" if spike else "skipped_step"
        samples = self._record(event, step, loss, parts, micro_batches, "skipped")
        if self._in_a_row >= self._config.max_skipped_steps:
            raise UserError(
                f"{self._in_a_row} steps in a row were skipped, the last one step {step} with loss {loss}: its samples "
                f"are {_shortened(samples)}; all stand in {self._config.run_dir}/metrics.jsonl under event {event}. "
                "Look at these samples, or lower optim.lr; the run goes on from its newest checkpoint"
            )
        return Verdict.ROLL_BACK if spike and self._config.spikes.action == "rollback" else Verdict.SKIPPED

    def rolled_back(self, step: int, saved: Path | None) -> None:
        """Note that after the spike of `step` the run went back to `saved`; None: there was no checkpoint.

        Raises:
            UserError: it did so too often.
        """
        if saved is None:
            self._say(f"step {step}: no checkpoint to go back to, the step is skipped instead")
            return
        self._rollbacks[saved.name] += 1
        if self._log is not None:
            self._log.write({"event": "rollback", "step": step, "to": str(saved)})
        self._say(f"back to {saved} after the spike of step {step}; the data in between are left out")
        if self._rollbacks[saved.name] > self._config.spikes.max_rollbacks:
            raise UserError(
                f"{self._rollbacks[saved.name]} rollbacks to {saved} (spikes.max_rollbacks is "
                f"{self._config.spikes.max_rollbacks}): the loss spikes whatever the data; the samples stand in "
                f"{self._config.run_dir}/metrics.jsonl under event loss_spike. Lower optim.lr, or remove that "
                "checkpoint to go on from an older one"
            )

    def _record(
        self, event: str, step: int, loss: float, parts: Tensor, micro_batches: list[MicroBatch], outcome: str
    ) -> list[int]:
        """Record which samples the step was made of, and which micro-batches had the largest loss. Returns all."""
        own = [(part, batch.sample_indices.tolist()) for part, batch in zip(parts.tolist(), micro_batches, strict=True)]
        found = list(chain.from_iterable(self._ranks.gather(own)))
        found.sort(key=lambda item: item[0] if math.isfinite(item[0]) else math.inf, reverse=True)
        samples = sorted(chain.from_iterable(indices for _, indices in found))
        worst = [{"loss": part, "samples": indices} for part, indices in found[:WORST]]
        if self._log is not None:
            record: dict[str, Any] = {"event": event, "step": step, "loss": str(loss), "outcome": outcome}
            self._log.write({**record, "limit": self._spikes.limit, "worst": worst, "samples": samples})
        what = f"loss {loss:.4f} is a spike (limit {self._spikes.limit:.4f})"
        if event == "skipped_step":
            what = f"loss {loss} or its gradient is not finite"
        self._say(
            f"step {step} {outcome}: {what}; samples {_shortened(samples)}, the largest loss {worst[0]['loss']:.4f} in "
            f"{_shortened(found[0][1])}"
        )
        return samples

    def _say(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)


def _shortened(samples: list[int]) -> str:
    """Sample numbers for a message: the first few of many."""
    return f"{', '.join(map(str, samples[:16]))}{', ...' if len(samples) > 16 else ''}"
