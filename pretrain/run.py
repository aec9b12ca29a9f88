"""A run: its parts, its start and end, and everything around the training step."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch.profiler import record_function

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.kernels.common.architecture import architecture
from lrnn.pretrain.changes import Changes, check_changes
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint import zero_state
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.checkpoint.writer import CheckpointWriter, Outcome
from lrnn.pretrain.config import Config, load_model_of
from lrnn.pretrain.data.heldout import HeldOut
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.data.staged import open_run_data
from lrnn.pretrain.data.training_data import TrainingData
from lrnn.pretrain.deepspeed_config import COPY, deepspeed_config
from lrnn.pretrain.describe import announce, describe, estimates, report_changes, report_checkpoint
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.engine import Engine, build_engine, build_model, compute_dtype
from lrnn.pretrain.fused.choice import uses_fused_layers
from lrnn.pretrain.gpu_check import check_kernels
from lrnn.pretrain.guard import Guard, Verdict
from lrnn.pretrain.hosts import check_same, check_shared
from lrnn.pretrain.init_from.begin import Beginning
from lrnn.pretrain.launch import STOPPED, StopRequest
from lrnn.pretrain.metrics.eigenvalues import EigenvalueProbe
from lrnn.pretrain.metrics.log import MetricsLog
from lrnn.pretrain.metrics.profiler import StepProfiler
from lrnn.pretrain.metrics.speed import Speed
from lrnn.pretrain.metrics.start_up import StartUp
from lrnn.pretrain.optim import has_other_groups_by_shape
from lrnn.pretrain.progress import Progress, check_same_run
from lrnn.pretrain.run_yaml import write_config
from lrnn.pretrain.schedule import learning_rate
from lrnn.pretrain.stages import model_in, naming, stage_at, stages_left, stages_of
from lrnn.pretrain.state_passing import open_states
from lrnn.pretrain.step import Step, warm_up
from lrnn.pretrain.watch.protocol import MakeEvaluator
from lrnn.pretrain.watch.watch import Watch, make_evaluator
from lrnn.pretrain.watchdog.watchdog import Watchdog
from lrnn.run_lock import RunLock
from lrnn.settings import dump, read_json

T = TypeVar("T")


class Run:
    """A pretraining run on one rank. All ranks call the same methods in the same order.

    Attributes:
        config: the run's configuration.
        ranks: this process among all.
        progress: how far the run is.
        engine: the DeepSpeed engine around the model.
        guard: decides whether a step may reach the weights.
        carried: states of this rank's rows, if samples pass them on.
        log: the run's log on the main process, None on others.
    """

    @classmethod
    @contextmanager
    def open(
        cls,
        config: Config,
        ranks: Ranks,
        stop: StopRequest,
        allow_change: bool = False,
        start_up: StartUp | None = None,
        make: MakeEvaluator | None = None,
    ) -> Iterator["Run"]:
        """Start a run, or resume it from its newest checkpoint, and hold its folder within the `with` block.

        Args:
            config: the run's configuration.
            ranks: this process among all.
            stop: tells whether this process was asked to stop.
            allow_change: resume although the configuration now gives other results.
            start_up: holds where the time since the start of the process went.
            make: makes what finds scores and samples between steps.

        Raises:
            UserError: on all ranks, if anything is wrong with the model, data, checkpoint or folder.
        """
        with ExitStack() as exits:
            yield cls(config, ranks, stop, exits, allow_change, start_up or StartUp(), make)

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        stop: StopRequest,
        exits: ExitStack,
        allow_change: bool,
        start_up: StartUp,
        make: MakeEvaluator | None,
    ):
        self.config, self.ranks, self._stop = config, ranks, stop
        self._stages = stages_of(config)
        self.progress = Progress()
        self._data_error: str | None = None
        self._left_out_said: set[str] = set()
        self._stopped, self._same_data = False, True
        self._watchdog = exits.enter_context(Watchdog(ranks, config.watchdog))
        with self.phase("checking data and checkpoints", step=0):
            consumed = self._on_main(lambda: checkpoint.samples_consumed(Path(config.run_dir))) or 0
            self._model_config, self._data, self._heldout = ranks.together(lambda: self._check_parts(consumed))
            check_same(config, self._model_config, self._data, ranks)
            evaluator = make_evaluator(make, config, self._model_config, self._data.save_tokenizer, ranks)
            self._engine_copy = ranks.together(self._read_engine_copy)
            self._saved = self._open_folder(exits)
            self._beginning = Beginning(config, self._model_config, self._saved, ranks)
            changes = self._resume(self._saved, allow_change) if self._saved is not None else {}
            if self.progress.samples < consumed:  # The newest checkpoint is broken: stages before it are done again.
                _, self._data, self._heldout = ranks.together(lambda: self._check_parts(self.progress.samples))
            self._first_step = self.progress.step
            self._on_main(lambda: write_config(config))
        start_up.lap("data and checkpoints")
        with self.phase("starting the engine" if self._saved is None else "loading the checkpoint", step=0):
            self.engine, self._probe = self._start_engine(start_up)
        data, same = self._data, self._saved if self._same_data else None
        self.carried = open_states(self.engine.module, data.chains, data.batching, config.data.seq_len, same)
        self.log = self._watchdog.log = ranks.together(self._open_log)
        if self.log is not None:
            exits.enter_context(closing(self.log))
        self._say(describe(config, ranks, self.engine, self._saved))
        self._beginning.report(self.log)
        self._say_estimate()
        if self.log is not None:
            report_changes(changes, self.progress.step, self.log)
        self._stage = stage_at(self._stages, self.progress.samples - 1)  # of the last step
        self._speed = Speed(self._stage.config, model_in(self._stage, self._model_config), ranks)
        self._watch = Watch(config, ranks, evaluator, self._first_step, self.log, self._speed, self.phase, stop)
        self.guard = Guard(config, ranks, self.progress.losses, self.log)
        self._profiler = exits.enter_context(StepProfiler(config, ranks))
        run_dir, save_tokenizer = Path(config.run_dir), self._data.save_tokenizer
        self._writer = exits.enter_context(
            CheckpointWriter(run_dir, ranks, config.checkpoint, save_tokenizer, self._report_checkpoint)
        )
        loader = self._data.loader(self.progress.samples, self.progress.stream, ranks.device.type == "cuda")
        exits.enter_context(loader)
        self._loader = loader
        start_up.lap("logs")
        if not self.finished:
            with self.phase("trying a first pass", step=0):
                for batch in self._data.throwaway_batches(self.progress.samples):
                    warm_up(self.engine, batch, self.carried)
                ranks.barrier()
            start_up.lap("first pass")
        self._report_start(start_up)
        self._speed.skip()

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Tell the watchdog what the main thread does from here on.

        All ranks enter the same phases in the same order. A phase lasts until the next one begins, so that there is no
        time without one.

        Args:
            name: completes the sentence "the rank is ...".
            step: the step that the phase belongs to, 0 before the first; default the next step.
        """
        self._watchdog.enter(name, self.progress.step + 1 if step is None else step)
        yield

    @property
    def finished(self) -> bool:
        """Return whether all steps are done."""
        return self.progress.step >= self.config.steps

    def watch(self) -> None:
        """Evaluate the model and generate samples, if they are due after the steps done so far."""
        self._watch.look(self.engine, self.progress.step)

    def next_batches(self) -> list[MicroBatch] | None:
        """Return this rank's micro-batches of the next step.

        Returns:
            None, on all ranks, if the run ends early: a rank was asked to stop, or has no data.
        """
        self._turn_profiler(self.progress.step + 1)
        batches: list[MicroBatch] = []
        try:
            batches = next(self._loader)
        except (UserError, OSError) as error:  # a shard that is corrupt, a source that went away
            self._data_error = str(error)
        with self.phase("agreeing whether to continue"):
            # All ranks agree once per step whether any rank wants to stop, lacks data, or still writes a checkpoint.
            stopped, broken, writing = self.ranks.worst(
                self._stop.signal is not None, self._data_error is not None, self._writer.vote
            )
        self._writer.advance(writing)
        self._stopped = bool(stopped)
        if stopped or broken:
            return None
        self._enter_stage()
        return batches

    def _enter_stage(self) -> None:
        """Enter the stage of the next step, if it is another one than that of the last step."""
        stage = stage_at(self._stages, self.progress.samples)
        first = self.config.stages and self.progress.samples == 0
        if self.log is not None and (first or stage is not self._stage):
            announce(stage, self.progress.step, self.log)
        if stage is not self._stage:
            self.guard.forget()
            self._speed.enter(stage.config, model_in(stage, self._model_config))
            self._stage = stage

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        return learning_rate(self.progress.step, self.config)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Time the `with` block as the computation of the next step, and note its eigenvalues if it is recorded."""
        if self._is_recorded(self.progress.step + 1):
            self._probe.arm()
        with record_function(f"step {self.progress.step + 1}"), self._speed.step():  # the name in a profile
            yield

    def judge(self, step: Step, batches: list[MicroBatch]) -> Verdict:
        """Count a step as done, and return whether it was good, skipped, or calls for a rollback.

        Raises:
            UserError: on all ranks, if too many steps in a row were skipped.
        """
        progress = self.progress
        progress.step += 1
        progress.samples += self._stage.config.global_batch_size
        progress.tokens += step.n_tokens
        progress.stream = self._loader.stream_state
        self._report_left_out()
        verdict = self.guard.judge(progress.step, self.engine.was_step_applied(), step, batches)
        progress.losses = self.guard.history
        if math.isfinite(step.loss):
            progress.unrecorded.append(step.loss)
        if verdict is not Verdict.GOOD:
            progress.skipped_steps += 1
            if self.carried is not None:
                self.carried.drop_bad_rows()
        return verdict

    def _report_left_out(self) -> None:
        """Record what the stream left out, as soon as there is another reason than those recorded."""
        left_out = self._loader.left_out
        if self.log is not None and not left_out.keys() <= self._left_out_said:
            self._left_out_said = set(left_out)
            self.log.write({"event": "left_out", "step": self.progress.step, "left_out": left_out})
            self._say(f"left out of the stream so far: {_listed(left_out)}")

    def _turn_profiler(self, step: int | None) -> None:
        """Begin to profile the step, and write the profile if the steps before it were the last ones."""
        if self._profiler.is_recording and (step is None or not self._profiler.covers(step)):
            with self.phase("writing the profile", self.progress.step):
                folder, error = None, None
                try:
                    folder = self._profiler.write(self.progress.step)
                except OSError as raised:
                    error = f"rank {self.ranks.rank}: {raised}"
                errors = [e for e in self.ranks.gather(error) if e is not None]
                if errors or folder is not None:
                    self._say(f"profile not written: {errors[0]}" if errors else f"profile written to {folder}")
            self._speed.skip()
        if step is not None:
            self._profiler.begin(step)

    def roll_back(self) -> bool:
        """Return to the newest intact checkpoint; only the position in the data is kept.

        Returns:
            False if there is no checkpoint yet; then nothing is changed.

        Raises:
            UserError: on all ranks, if the run returned to that checkpoint too often.
        """
        spike_at = self.progress.step
        with self.phase("going back to a checkpoint", spike_at):
            self._writer.wait()
            saved = self._newest_checkpoint()
            if saved is not None:
                self._restore(saved)
            self.guard.rolled_back(spike_at, saved, self.progress.losses)
            if saved is not None:
                self._stage = stage_at(self._stages, Progress.read(saved).samples - 1)
        if saved is not None:
            self._watch.went_back(self.progress.step)
            self._speed.skip()
        return saved is not None

    def measure(self, step: Step) -> None:
        """Record the step, and measure the held-out loss, if they are due."""
        progress = self.progress
        record: dict[str, Any] = {}
        if self._is_recorded(progress.step):
            losses = progress.unrecorded or [step.loss]
            record = {"step": progress.step, "loss": math.fsum(losses) / len(losses), "loss_last": step.loss}
            progress.unrecorded = []
            record |= {"lr": step.lr, "grad_norm": float(self.engine.get_global_grad_norm())}
            record |= {} if step.z_loss is None else {"z_loss": step.z_loss}
            record |= self._place() | {"skipped_steps": progress.skipped_steps}
            record |= self._speed.read(self._loader.take_wait_s())
            record["eigenvalues"] = self._probe.read()
        if self._heldout.due(progress.step):
            with self.phase("measuring the held-out loss", progress.step):
                heldout = self._heldout.losses(self.engine, self._stage)
                record |= {"step": progress.step, **heldout, **self._place()}
                self._speed.skip()
        with self.phase("writing metrics", progress.step):
            if self.log is not None and record:
                self.log.write(record)

    def _place(self) -> dict[str, Any]:
        """Return how much data the run has gone through."""
        progress = self.progress
        epochs = self._data.epochs(progress.samples, progress.stream)
        place = {"tokens": progress.tokens, "samples": progress.samples, "epochs": epochs}
        return place | ({"stage": self._stage.number} if self.config.stages else {})

    def save_if_due(self) -> None:
        """Begin a checkpoint, if one is due."""
        if self._writer.due(self.progress.step):
            with self.phase("saving a checkpoint", self.progress.step):
                self._begin_checkpoint()
                self._speed.skip()

    def close(self) -> int:
        """Write the checkpoint of the last step.

        Returns:
            The exit status: `STOPPED` if a signal ended the run early, otherwise 0.

        Raises:
            UserError: on all ranks, if that checkpoint cannot be written or data failed.
        """
        self._turn_profiler(None)
        step = self.progress.step
        with self.phase("saving a checkpoint", step):
            self._writer.wait()
            if step not in (self._first_step, self._writer.saved_step):
                self._begin_checkpoint()
                self._writer.wait()
                if self._writer.saved_step != step:
                    raise UserError(
                        f"the checkpoint of step {step} could not be written: {self._writer.error}; fix the storage "
                        "and run the same command: it resumes the run from its newest checkpoint"
                    )
        reasons = [reason for reason in self.ranks.gather(self._data_error) if reason is not None]
        if reasons:
            raise UserError(f"{reasons[0]} (the run stopped at step {step}, and its checkpoint is written)")
        if not self._stopped:
            self.watch()
        with self.phase("closing the logs", step):
            if self._loader.left_out:
                self._say(f"left out of the stream: {_listed(self._loader.left_out)}")
            self._say("stopped by a signal: run the same command to resume" if self._stopped else "done")
        return STOPPED if self._stopped else 0

    def _check_parts(self, samples: int) -> tuple[LrnnConfig, TrainingData, HeldOut]:
        """Open and check the model's configuration, the training data and the held-out data, from a sample on."""
        model_config = load_model_of(self.config)
        for stage in stages_left(self.config, samples):
            with naming(stage, self.config):
                dtype = compute_dtype(deepspeed_config(stage.config, self.ranks.world_size))
        if self.ranks.device.type == "cuda":
            check_kernels(model_config, dtype, architecture(self.ranks.device))
        uses_fused_layers(self.config, self.ranks.device, dtype)  # which may be impossible
        data = open_run_data(self.config, model_config, self.ranks, samples)
        return model_config, data, HeldOut(self.config, self.ranks, samples)

    def _read_engine_copy(self) -> dict[str, str]:
        """Return the files of a checkpoint that keep the DeepSpeed JSON, which may change while the run continues."""
        path = self.config.deepspeed
        return {} if path is None else {COPY: json.dumps(read_json(path, "DeepSpeed configuration"), indent=2)}

    def _open_folder(self, exits: ExitStack) -> Path | None:
        """Hold the run's folder, and return its newest checkpoint."""

        def lock() -> None:
            exits.enter_context(RunLock(Path(self.config.run_dir)))

        self._on_main(lock)
        check_shared(Path(self.config.run_dir), self.ranks)
        return self._newest_checkpoint()

    def _open_log(self) -> MetricsLog | None:
        """Return the run's log on the main process, None on others."""
        if not self.ranks.is_main:
            return None
        model = json.loads(self._model_config.to_json_string(use_diff=False))
        return MetricsLog(self.config, self._first_step, self._saved is not None, self.ranks, model)

    def _resume(self, saved: Path, allow_change: bool) -> Changes:
        """Take the progress of a checkpoint. Return the keys that changed since; refuse those that must not."""
        changes = self.ranks.together(lambda: check_changes(saved, self.config, allow_change))
        facts = self._data.description, self._data.as_of_0_1_0, self._data.stages
        data = check_same_run(saved, self._model_config, *facts, allow_change=allow_change, changes=changes)
        self.progress = Progress.read(saved)
        self._same_data = not data
        if data & {"stream", "corpora"}:  # The position in a stream means nothing in other data.
            self.progress.stream = None
        return changes

    def _report_start(self, start_up: StartUp) -> None:
        """Show and record where the time since the start of the main process went."""
        if self.log is not None:
            seconds = {name: round(value, 3) for name, value in start_up.seconds.items()}
            self.log.write({"event": "ready", "step": self.progress.step, "seconds": seconds})
            self._say(str(start_up))

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint. The main process reads all checksums."""
        return self._on_main(lambda: checkpoint.find_newest(Path(self.config.run_dir)))

    def _start_engine(self, start_up: StartUp) -> tuple[Engine, EigenvalueProbe]:
        """Return the model in a DeepSpeed engine, with the checkpoint's weights and moments if the run resumes."""
        state = SavedState(self._saved) if self._saved is not None else None
        recompute = self.config.activation_checkpointing == "full"
        fresh = state is None and not self._beginning.has_weights
        model = build_model(self._model_config, self.config.seed, recompute, fill=fresh)
        self._beginning.load_into(model)
        start_up.lap("model")
        if state is not None:
            state.load_into(model)
            start_up.lap("checkpoint")
        probe = EigenvalueProbe(model)
        by_shape = self.progress.decay_by_shape
        if by_shape and has_other_groups_by_shape(model):
            self._say(
                "this run began with an earlier version of lrnn, and keeps its weight decay: the mixer's gate biases "
                "have it, and recurrent matrices do not; new runs have it on linear maps only"
            )
        stage = stages_left(self.config, self.progress.samples)[0]
        engine = build_engine(model.to(self.ranks.device), stage.config, self.ranks, by_shape)
        start_up.lap("engine")
        if state is not None:
            zero_state.restore(engine, state.read, self.progress.optimizer_step)
            start_up.lap("checkpoint")
        return engine, probe

    def _restore(self, saved: Path) -> None:
        """Put weights, moments and step of a checkpoint into the engine; the position in the data stays."""
        before, state = Progress.read(saved), SavedState(saved)
        zero_state.load_module(self.engine, state.load_into)
        zero_state.restore(self.engine, state.read, before.optimizer_step)
        progress = self.progress
        progress.step, progress.tokens, progress.losses = before.step, before.tokens, before.losses
        progress.unrecorded = before.unrecorded
        progress.rollbacks += 1
        if self.carried is not None:
            self.carried.reset()

    def _begin_checkpoint(self) -> None:
        self.progress.optimizer_step = zero_state.optimizer_step(self.engine)
        progress = {"step": self.progress.step, "progress": asdict(self.progress), "data": self._data.description}
        texts = {"config.json": self._model_config.to_json_string(use_diff=False), "run.yaml": dump(self.config)}
        carried = {} if self.carried is None else self.carried.tensors(self.progress.samples)
        self._writer.begin(self.engine, progress, texts | self._engine_copy | self._beginning.texts, carried)

    def _report_checkpoint(self, outcome: Outcome) -> None:
        if self.log is not None:
            report_checkpoint(outcome, self.progress.step, self.log)

    def _is_recorded(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.config.steps

    def _on_main(self, action: Callable[[], T]) -> T | None:
        """Run `action` on the main process; return its value, or raise its UserError, on all ranks."""
        return self.ranks.gather(self.ranks.together(action if self.ranks.is_main else lambda: None))[0]

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def _say_estimate(self) -> None:
        """Show what the run takes, as `lrnn plan` computes it for GPUs."""
        if self.ranks.device.type == "cuda":
            for line in estimates(self._stages, self.config, self._model_config, self.ranks, self.progress):
                self._say(line)


def _listed(left_out: dict[str, list]) -> str:
    """Return what a stream left out, for a message: reason -> [how often, where first]."""
    return "; ".join(f"{count:,} x {reason} (first: {where})" for reason, (count, where) in left_out.items())
