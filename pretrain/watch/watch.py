"""Evaluate a run between its steps: decide what is due, ask the evaluator, and record what it found."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine
from lrnn.pretrain.launch import StopRequest
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.metrics.speed import Speed
from lrnn.pretrain.watch.protocol import Evaluator, Found, MakeEvaluator, Wants
from lrnn.pretrain.watch.undisturbed import undisturbed
from lrnn.records import events_by_step, read_metrics

Phase = Callable[[str, int], AbstractContextManager[None]]


def make_evaluator(
    make: MakeEvaluator | None,
    config: Config,
    model_config: LrnnConfig,
    save_tokenizer: Callable[[Path], object],
    ranks: Ranks,
) -> Evaluator | None:
    """Return the evaluator of a run, None if it wants none. What it needs is checked here, on all ranks together.

    Raises:
        UserError: on all ranks, if a task, its data or a prompt is not as it should be, or there is no way to evaluate.
    """
    if not (config.eval.every or config.samples.every):
        return None
    if make is None:
        raise UserError("eval.every and samples.every need an evaluator: start the run with `lrnn pretrain`")
    with undisturbed(ranks.device):
        return ranks.together(lambda: make(config, model_config, save_tokenizer, ranks))


class Watch:
    """Evaluate a run after the steps where something is due, without changing its training.

    Args:
        config: the run's configuration.
        ranks: this process among all.
        evaluator: finds scores and samples; None to look at nothing.
        first_step: step that the run resumes at. What its records show of this step is not done again, and what they
            lack is done now: a signal or a crash came before.
        log: the run's log on the main process, None on others.
        speed: the clock of the run, which leaves out what happens here.
        phase: tells the watchdog what happens.
        stop: tells whether this process was asked to stop.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        evaluator: Evaluator | None,
        first_step: int,
        log: MetricsLog | None,
        speed: Speed,
        phase: Phase,
        stop: StopRequest,
    ):
        self._config, self._ranks, self._evaluator = config, ranks, evaluator
        self._log, self._speed, self._phase, self._stop = log, speed, phase, stop
        self._done: dict[str, set[int]] = {"scores": set(), "samples": set()}
        if evaluator is not None:
            known = ranks.gather(self._recorded(first_step) if ranks.is_main else [])[0]
            for name in known:
                self._done[name].add(first_step)

    def _recorded(self, step: int) -> list[str]:
        """Return what the run's records show of a step."""
        run_dir = Path(self._config.run_dir)
        records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []  # The disk may have been full.
        events = {"scores": "eval", "samples": "samples"}
        return [name for name, event in events.items() if step in events_by_step(records, event)]

    def went_back(self, step: int) -> None:
        """Note that the run returned to the weights of an earlier step."""
        for name, steps in self._done.items():
            self._done[name] = {done for done in steps if done <= step}

    def look(self, engine: Engine, step: int) -> None:
        """Find and record what is due after `step` steps. A failure is recorded, and the run continues.

        If a rank is asked to stop meanwhile, the rest is left to the run that resumes from this step.
        """
        wants = Wants(step, self._due("scores", step), self._due("samples", step))
        if self._evaluator is None or not (wants.scores or wants.samples):
            return
        if self._ranks.worst(self._stop.signal is not None)[0]:
            return
        start = time.monotonic()

        def turn() -> None:
            with self._phase("evaluating the model", step):
                pass  # A phase lasts until the next one begins.

        with self._speed.paused():
            with self._phase("evaluating the model", step), undisturbed(self._ranks.device):
                found = self._evaluator.evaluate(engine, wants, turn, lambda: self._stop.signal is not None)
            for name, wanted in (("scores", wants.scores), ("samples", wants.samples)):
                if wanted and not found.interrupted:
                    self._done[name].add(step)
            with self._phase("writing metrics", step):
                self._record(step, found, time.monotonic() - start)

    def _due(self, name: str, step: int) -> bool:
        every = self._config.eval.every if name == "scores" else self._config.samples.every
        on_time = every > 0 and step > 0 and (step % every == 0 or step == self._config.steps)
        return on_time and step not in self._done[name]

    def _record(self, step: int, found: Found, seconds: float) -> None:
        if self._log is None:
            return
        if found.scores is not None:
            self._log.write_scores(step, found.scores, seconds)
        if found.samples is not None:
            self._log.write_samples(step, found.samples)
        for what, error in found.errors.items():
            self._log.write({"event": "eval_failed", "step": step, "what": what, "error": error})
            self._log.say(f"warning: step {step}: {what} failed, training continues: {error}")
        if found.interrupted:
            self._log.say(f"step {step}: a signal came during the evaluation; the run makes it when it resumes")
