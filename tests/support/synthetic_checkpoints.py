"""Checkpoints of a synthetic training state, written by the real writer without a model or an engine."""

import json
import threading
from pathlib import Path

import torch

from lrnn.pretrain.checkpoint import writer as checkpoint_writer
from lrnn.pretrain.checkpoint.writer import CheckpointWriter, Outcome
from lrnn.pretrain.checkpoint.zero_state import Fragment
from lrnn.pretrain.config import CheckpointConfig

KINDS = ("param", "exp_avg", "exp_avg_sq")
SHAPES = {"embed.weight": (7, 5), "norm.weight": (5,), "A_log": (1,)}


class ThreadRank:
    """One of several ranks that are threads of this process. By default, the only one."""

    def __init__(self, rank: int = 0, values: list | None = None, meeting: threading.Barrier | None = None):
        self._values, self._meeting = values or [None], meeting or threading.Barrier(1)
        self.rank, self.world_size, self.is_main = rank, len(self._values), rank == 0
        self.device = torch.device("cpu")

    def gather(self, value):
        self._values[self.rank] = value
        self._meeting.wait()
        gathered = list(self._values)
        self._meeting.wait()
        return gathered

    def together(self, action):
        value = action()
        self.gather(None)
        return value


def state_of(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Return a parameter and its moments, flattened, by (kind, name)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    return {(kind, name): torch.randn(n, generator=generator) for kind in KINDS for name, n in sizes.items()}


def fragments_of(state: dict[tuple[str, str], torch.Tensor], rank: int = 0, world_size: int = 1):
    """Return the part of the state that a rank holds: an equal part of every tensor, shorter on the last rank."""
    for name, shape in SHAPES.items():
        n = torch.Size(shape).numel()
        part = -(-n // world_size)
        low, high = min(n, rank * part), min(n, (rank + 1) * part)
        if low < high:
            yield Fragment(name, low, high - low, {kind: state[kind, name][low:high] for kind in KINDS})


def save_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"pieces" * 50)
    (folder / "tokenizer_config.json").write_text("{}")


def contents(step: int) -> tuple[dict, dict[str, str]]:
    """Return `progress.json` and the other small files of a checkpoint."""
    progress = {"step": step, "progress": {"step": step, "samples": 8 * step}}
    return progress, {"config.json": json.dumps({"hidden_size": 5}), "run.yaml": f"steps: {step}\n"}


class Saver:
    """Writes checkpoints into `run_dir` as one rank of a run does. `outcomes` holds the reported outcomes."""

    def __init__(self, run_dir: Path, monkeypatch, ranks: ThreadRank | None = None, **settings):
        self._ranks = ranks or ThreadRank()
        monkeypatch.setattr(checkpoint_writer, "local_fragments", lambda engine: fragments_of(*engine))
        self.outcomes: list[Outcome] = []
        settings = {"every": 10, "keep_last": 1000, "background": False} | settings
        self.writer = CheckpointWriter(
            run_dir, self._ranks, CheckpointConfig(**settings), save_tokenizer, self.outcomes.append
        )

    def begin(self, step: int, state: dict[tuple[str, str], torch.Tensor] | None = None) -> None:
        """Begin a checkpoint of `state`, by default of `state_of(step)`."""
        engine = (state or state_of(step), self._ranks.rank, self._ranks.world_size)
        self.writer.begin(engine, *contents(step))

    def save(self, step: int) -> Path:
        """Write a checkpoint of `state_of(step)`, wait for it, and return its folder."""
        self.begin(step)
        self.writer.wait()
        assert self.outcomes[-1].step == step and self.outcomes[-1].error is None, self.outcomes[-1]
        return self.outcomes[-1].folder
