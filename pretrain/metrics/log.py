"""The record of a run: `metrics.jsonl`, the same numbers for TensorBoard and wandb, and what a person sees."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.model.layers import Mixer
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics.flops import peak_flops, train_flops_per_token
from lrnn.records import DurableLines

EIGENVALUE_BINS = 20  # equal bins over [-1, 1]


class MetricsLog:
    """Appends one JSON object a record to `metrics.jsonl` and passes its numbers on.

    A run that resumes appends too; steps that it repeats then stand twice, the later line counts. A disk that is full
    does not end the run: records wait in memory and are written as soon as there is room.
    Only the main process makes one.
    """

    def __init__(self, config: Config, start_step: int, resumed: bool, ranks: Ranks):
        run_dir, self._steps = Path(config.run_dir), config.steps
        self._lines = DurableLines(run_dir / "metrics.jsonl")
        self._lines_failed = False
        self._tensorboard = self._wandb = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        if config.log.wandb_project is not None:
            self._wandb = _start_wandb(config.log.wandb_project, run_dir)
        self._bar = tqdm(total=self._steps, initial=start_step, unit="step") if sys.stderr.isatty() else None
        self._started, self._start_step = time.monotonic(), start_step
        self.write({"event": "start", "step": start_step, "processes": ranks.world_size, "resumed": resumed})

    def write(self, record: dict[str, Any]) -> None:
        """Record and, where it has a loss, show. `record` must be JSON; its numbers, nested ones too, become curves.

        NaN and infinity are written as null: JSON has neither.
        """
        error = self._lines.write(json.dumps(_without_nonfinite(record)))
        if error is not None and not self._lines_failed:
            self.say(f"{self._lines.path} cannot be written, records are kept in memory until it can: {error}")
        self._lines_failed = error is not None
        if "step" not in record or "event" in record:
            return
        numbers = dict(_numbers(record))
        if self._tensorboard:
            self._to_tensorboard(lambda board: [board.add_scalar(k, v, record["step"]) for k, v in numbers.items()])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])
        if "loss" in record:
            self._show(record)

    def _to_tensorboard(self, action: Callable[[Any], object]) -> None:
        try:
            action(self._tensorboard)
        except OSError as error:  # of its writing thread, which is dead after that
            self._tensorboard = None
            self.say(f"TensorBoard's files cannot be written; {self._lines.path} goes on: {error}")

    def _show(self, record: dict[str, Any]) -> None:
        """The bar on a terminal, a line elsewhere."""
        step = record["step"]
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        # After a rollback the run may stand where it began, or before.
        done = max(1, step - self._start_step)
        left = (time.monotonic() - self._started) / done * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"|grad| {record['grad_norm']:.3f}  {record['tokens_per_second_per_gpu']:,.0f} tokens/s/process"
        )
        if record.get("mfu") is not None:
            line += f"  MFU {100 * record['mfu']:.1f}%"
        if "heldout_loss" in record:
            line += f"  held-out {record['heldout_loss']:.4f}"
        self.say(f"{line}  {left:,.0f} s left")

    def say(self, text: str) -> None:
        """A remark that does not break the progress bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stderr)
            return
        # A full disk under the log must not end the run; what was not written stays in the buffer for the next line.
        with suppress(OSError):
            print(text, flush=True)

    def close(self) -> None:
        lost = self._lines.close()
        if lost:
            self.say(f"{lost} bytes of {self._lines.path} could not be written and are lost")
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard:
            self._to_tensorboard(lambda board: board.close())
        if self._wandb:
            self._wandb.finish()


class Speed:
    """Times steps: whole ones, and the part of them that is forward, backward and update."""

    def __init__(self, config: Config, model_config: LrnnConfig, ranks: Ranks):
        self._tokens = config.global_batch_size * config.data.seq_len / ranks.world_size  # a step and process
        self._flops = train_flops_per_token(model_config)
        self._device = ranks.device
        self._peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._steps, self._inside_s, self._whole_s = 0, 0.0, 0.0
        self.skip()

    def skip(self) -> None:
        """Leave the time since the last step out: a held-out loss, a checkpoint."""
        self._mark = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around forward, backward and update. What lies between two of them counts to the later one."""
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self._inside_s += now - start
        self._whole_s += now - self._mark
        self._mark = now
        self._steps += 1

    def read(self, wait_s: float) -> dict[str, Any]:
        """Averages over the steps since the last call, of which `wait_s` seconds were spent waiting for data."""
        step_s, inside_s = self._whole_s / self._steps, self._inside_s / self._steps
        record = {
            "step_seconds": round(step_s, 5),
            "loop_seconds": round(step_s - inside_s, 5),  # outside of forward, backward and update
            "data_wait_seconds": round(wait_s / self._steps, 5),
            "tokens_per_second_per_gpu": round(self._tokens / step_s, 1),
            "mfu": round(self._tokens / step_s * self._flops / self._peak, 4) if self._peak else None,
            "memory_gb": round(_peak_memory(self._device) / 1e9, 3),
        }
        self._steps, self._inside_s, self._whole_s = 0, 0.0, 0.0
        return record


class EigenvalueProbe:
    """How much each layer uses negative eigenvalues: the distribution of those of the state transitions, over tokens,
    heads and whatever else has one (channels, factors).

    While `enabled`, each forward pass notes the eigenvalues of every mixer that has a range of them; otherwise they are
    not computed.
    """

    def __init__(self, model: nn.Module):
        self.enabled = False
        self._counts: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, Mixer) and module.has_eigenvalue_range:
                module.on_eigenvalues = self._note(module.layer_idx)

    def _note(self, layer: int) -> Callable[[Callable[[], Tensor]], None]:
        def note(compute: Callable[[], Tensor]) -> None:
            if self.enabled:
                with torch.no_grad():
                    self._counts[layer] = torch.histc(compute().float(), EIGENVALUE_BINS, -1, 1)

        return note

    def counts(self) -> Tensor | None:
        """Eigenvalues in each bin [layers, bins], float32 on the device, from the last pass that was noted."""
        return torch.stack([self._counts[i] for i in sorted(self._counts)]) if self._counts else None

    def read(self) -> dict[str, Any]:
        """Per layer the fraction of each bin and of the negative half, from the last pass that was noted."""
        counts = self.counts()
        return {} if counts is None else self.describe(counts.cpu())

    @staticmethod
    def describe(counts: Tensor) -> dict[str, Any]:
        """What `read` returns, from `counts` on the CPU."""
        fractions = counts / counts.sum(-1, keepdim=True)
        negative = fractions[:, : EIGENVALUE_BINS // 2].sum(-1)
        return {
            "negative_fraction": {str(i): round(x, 5) for i, x in enumerate(negative.tolist())},
            "histogram": [[round(x, 5) for x in row] for row in fractions.tolist()],
        }


def _peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nonfinite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict[str, Any], prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield prefix + key, value


def _start_wandb(project: str, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"log.wandb_project is {project!r} but wandb is not installed: pip install 'lrnn[wandb]'"
        ) from None
    # The name is the identity, so that a resumed run goes on in the same record.
    return wandb.init(project=project, id=run_dir.resolve().name, dir=str(run_dir), resume="allow")
