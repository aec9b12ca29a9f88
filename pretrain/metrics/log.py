"""The record of a run: `metrics.jsonl`, the same numbers in TensorBoard and wandb, and the lines a person reads."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lrnn.environment import describe_environment
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics import wandb_run
from lrnn.pretrain.watch.protocol import Sample, Score
from lrnn.records import HELDOUT_OF_CORPUS, DurableLines, utc_now

PACKAGES = ("deepspeed", "transformers", "tokenizers", "datasets", "numpy")  # the start of a run records their versions


class MetricsLog:
    """Append one JSON object per record to `metrics.jsonl`, and pass its numbers to TensorBoard and wandb.

    A run that resumes appends to the same file. A step that it repeats then appears twice, and the later line counts. A
    full disk does not end the run: records wait in memory and are written as soon as there is room. Only the main
    process makes one.

    Args:
        config: the run's configuration; `log`, `run_dir` and `steps` are used.
        start_step: number of steps done so far.
        resumed: whether the run continues from a checkpoint.
        ranks: the processes of the run.
        model: the fields of the model, for wandb.

    Raises:
        UserError: wandb is wanted but is not installed, or does not start.
    """

    def __init__(
        self, config: Config, start_step: int, resumed: bool, ranks: Ranks, model: dict[str, Any] | None = None
    ):
        run_dir, self._steps = Path(config.run_dir), config.steps
        self._lines = DurableLines(run_dir / "metrics.jsonl")
        self._lines_failed = False
        self._tensorboard = self._wandb = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        if config.log.wandb_project is not None:
            whole = config.model_dump() | {"model": model, "processes": ranks.world_size}
            self._wandb = wandb_run.start(config.log.wandb_project, run_dir, resumed, whole)
        self._bar = tqdm(total=self._steps, initial=start_step, unit="step") if sys.stderr.isatty() else None
        self._started, self._start_step = time.monotonic(), start_step
        start = {"event": "start", "step": start_step, "processes": ranks.world_size, "resumed": resumed}
        self.write(start | {"versions": describe_environment(ranks.device, PACKAGES)})

    def write(self, record: dict[str, Any]) -> None:
        """Write a record with the time, and show it if it has a loss.

        Args:
            record: any JSON object. Its numbers, nested ones included, become curves if it has a step and no event. NaN
                and infinity are written as null, because JSON has neither.
        """
        error = self._lines.write(json.dumps({**_without_nonfinite(record), "time": utc_now()}))
        if error is not None and not self._lines_failed:
            self.say(f"{self._lines.path} cannot be written, records are kept in memory until it can be: {error}")
        self._lines_failed = error is not None
        if "step" not in record or "event" in record:
            return
        self._to_curves(record["step"], dict(_numbers(record)))
        if "loss" in record:
            self._show(record)

    def write_scores(self, step: int, scores: Sequence[Score], seconds: float) -> None:
        """Write and show scores of lm-eval, which become the curves `eval/TASK/METRIC`.

        Args:
            step: the step whose weights have them.
            scores: metrics of tasks and groups.
            seconds: what it took.
        """
        values: dict[str, dict[str, float]] = {}
        errors: dict[str, dict[str, float]] = {}
        for score in scores:
            values.setdefault(score.task, {})[score.key] = score.value
            if score.stderr is not None:
                errors.setdefault(score.task, {})[score.key] = score.stderr
        record = {"event": "eval", "step": step, "seconds": round(seconds, 3), "scores": values, "stderr": errors}
        self.write(record)
        curves = {f"eval/{score.task}/{score.key.replace(',', '/')}": score.value for score in scores}
        self._to_curves(step, {name: value for name, value in curves.items() if math.isfinite(value)})
        shown = ", ".join(f"{score.task} {score.key} {score.value:.4f}" for score in scores)
        self.say(f"step {step}/{self._steps}  evaluated in {seconds:.1f} s: {shown}")

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write generated texts to `samples.jsonl`, a line for each prompt, and to TensorBoard and wandb."""
        file = self._lines.path.with_name("samples.jsonl")
        lines = DurableLines(file)
        for sample in samples:
            error = lines.write(json.dumps({"step": step, **sample._asdict(), "time": utc_now()}, ensure_ascii=False))
        lines.close()
        if error is None:
            self.write({"event": "samples", "step": step, "samples": len(samples)})
            self.say(f"step {step}/{self._steps}  {len(samples)} samples in {file}")
        else:
            self.say(f"the samples of step {step} could not be written: {error}")
        if self._tensorboard:
            texts = {f"samples/{number}": _plain(prompt + text) for number, (prompt, text) in enumerate(samples, 1)}
            self._to_tensorboard(lambda board: [board.add_text(name, text, step) for name, text in texts.items()])
        if self._wandb:
            self._to_wandb(lambda run: run.log({"step": step, "samples": wandb_run.table(samples)}))

    def _to_curves(self, step: int, numbers: dict[str, int | float]) -> None:
        """Pass numbers of a step to TensorBoard and wandb."""
        if self._tensorboard:
            self._to_tensorboard(lambda board: [board.add_scalar(k, v, step) for k, v in numbers.items()])
        if self._wandb:
            self._to_wandb(lambda run: run.log({"step": step, **numbers}))

    def _to_tensorboard(self, action: Callable[[Any], object]) -> None:
        try:
            action(self._tensorboard)
        except OSError as error:  # TensorBoard's writing thread has died of it.
            self._tensorboard = None
            self.say(f"TensorBoard's files cannot be written; {self._lines.path} continues without them: {error}")

    def _to_wandb(self, action: Callable[[Any], object]) -> None:
        try:
            action(self._wandb)
        except Exception as error:  # Its process or connection may end in many ways, and the run should not.
            self._wandb = None
            self.say(f"wandb does not take records any more; {self._lines.path} continues without it: {error!r}")

    def _show(self, record: dict[str, Any]) -> None:
        """Move the progress bar on a terminal; print a line elsewhere."""
        step = record["step"]
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        # After a rollback the run may be at the step where it began, or before it.
        done = max(1, step - self._start_step)
        left = (time.monotonic() - self._started) / done * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"|grad| {record['grad_norm']:.3f}  {record['tokens_per_second_per_gpu']:,.0f} tokens/s/process"
        )
        if record.get("mfu") is not None:
            line += f"  MFU {100 * record['mfu']:.1f}%"
        if "heldout_loss" in record:
            line += f"  held-out {record['heldout_loss']:.4f}{_by_corpus(record)}"
        self.say(f"{line}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stderr)
            return
        # A full disk under the log must not end the run. The text stays in the buffer until the next line.
        with suppress(OSError):
            print(text, flush=True)

    def close(self) -> None:
        """Close the files, and say how many bytes could not be written."""
        lost = self._lines.close()
        if lost:
            self.say(f"{lost} bytes of {self._lines.path} could not be written and are lost")
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard:
            self._to_tensorboard(lambda board: board.close())
        if self._wandb:
            self._to_wandb(lambda run: run.finish())


def _plain(text: str) -> str:
    """Return a text that Markdown, which TensorBoard renders, shows as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _by_corpus(record: dict[str, Any]) -> str:
    """Return the held-out loss of each corpus for the line of a record, in brackets; nothing if there is one corpus."""
    losses = {
        key.removeprefix(HELDOUT_OF_CORPUS): loss for key, loss in record.items() if key.startswith(HELDOUT_OF_CORPUS)
    }
    listing = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return f" ({listing})" if listing else ""


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield prefix + key, value
