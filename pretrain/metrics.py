"""The record of a run: `metrics.jsonl`, the same numbers for TensorBoard and wandb, and what a person sees."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrnn.errors import UserError
from lrnn.modeling_lrnn import DeltaNet
from lrnn.pretrain.config import LogConfig

EIGENVALUE_BINS = 20  # equal bins over [-1, 1]


class MetricsLog:
    """Appends one JSON object a record to `metrics.jsonl` and passes its numbers on.

    A run that resumes appends too; steps that it repeats then stand twice, the later line counts.
    Only the main process makes one.
    """

    def __init__(self, run_dir: Path, config: LogConfig, steps: int, start_step: int):
        self._file = (run_dir / "metrics.jsonl").open("a")
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        if config.wandb_project is not None:
            self._wandb = _start_wandb(config.wandb_project, run_dir)
        self._bar = tqdm(total=steps, initial=start_step, unit="step") if sys.stderr.isatty() else None
        self._started, self._start_step, self._steps = time.monotonic(), start_step, steps

    def write(self, record: dict[str, Any]) -> None:
        """`record` must be JSON; numbers among its values, also inside dictionaries, become curves."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if "step" not in record or "event" in record:
            return
        numbers = dict(_numbers(record))
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])

    def show(self, record: dict[str, Any]) -> None:
        """The bar on a terminal, a line elsewhere."""
        step = record["step"]
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = (time.monotonic() - self._started) / (step - self._start_step) * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"|grad| {record['grad_norm']:.3f}  {record['tokens_per_second_per_gpu']:,.0f} tokens/s/process"
        )
        if record.get("mfu") is not None:
            line += f"  MFU {100 * record['mfu']:.1f}%"
        if "heldout_loss" in record:
            line += f"  held-out {record['heldout_loss']:.4f}"
        print(f"{line}  {left:,.0f} s left", flush=True)

    def say(self, text: str) -> None:
        """A remark that does not break the progress bar."""
        tqdm.write(text, file=sys.stderr) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class EigenvalueProbe:
    """How much each layer uses negative eigenvalues: the distribution of 1 - beta over tokens and heads.

    While `enabled`, each forward pass notes the eigenvalues of every DeltaNet layer.
    """

    def __init__(self, model: nn.Module):
        self.enabled = False
        self._counts: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, DeltaNet):
                module.b_proj.register_forward_hook(self._hook(module.layer_idx, module.beta_range))

    def _hook(self, layer: int, beta_range: float):
        def note(module, args, logits: Tensor) -> None:
            if self.enabled:
                eigenvalues = 1 - beta_range * logits.detach().float().sigmoid()
                self._counts[layer] = torch.histc(eigenvalues, EIGENVALUE_BINS, -1, 1)

        return note

    def read(self) -> dict[str, Any]:
        """Per layer the fraction of each bin and of the negative half, from the last pass that was noted."""
        if not self._counts:
            return {}
        counts = torch.stack([self._counts[i] for i in sorted(self._counts)]).cpu()
        fractions = counts / counts.sum(-1, keepdim=True)
        negative = fractions[:, : EIGENVALUE_BINS // 2].sum(-1)
        return {
            "negative_fraction": {str(i): round(x, 5) for i, x in enumerate(negative.tolist())},
            "histogram": [[round(x, 5) for x in row] for row in fractions.tolist()],
        }


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run in the order they were written; a last line cut short by a crash is left out.

    Raises:
        UserError: the folder holds no metrics.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no metrics.jsonl; give the run_dir of a run")
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


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
