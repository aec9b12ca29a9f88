"""How fast a run is: tokens per second, model FLOPs utilisation, memory, and where the time of a step goes."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lrnn import LrnnConfig
from lrnn.pretrain.config import Config
from lrnn.pretrain.distributed import Ranks
from lrnn.pretrain.metrics.flops import peak_flops, train_flops_per_token


class Speed:
    """Time whole steps, and the part of each that is forward pass, backward pass and update."""

    def __init__(self, config: Config, model_config: LrnnConfig, ranks: Ranks):
        self._device, self._processes = ranks.device, ranks.world_size
        self._peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._steps, self._inside_s, self._whole_s = 0, 0.0, 0.0
        self._peak_bytes = 0  # of allocated memory, up to the last pause
        self._done_tokens = self._done_flops = 0.0  # per process
        self.enter(config, model_config)
        self.skip()

    def enter(self, config: Config, model_config: LrnnConfig) -> None:
        """Count the next steps by the sizes of this configuration and model: a stage of the run."""
        self._tokens = config.global_batch_size * config.data.seq_len / self._processes  # tokens per step and process
        self._flops = train_flops_per_token(model_config)

    def skip(self) -> None:
        """Leave out the time since the last step, which went into a held-out loss or a checkpoint."""
        self._mark = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the `with` block and, on a GPU, the memory that it allocates."""
        self._peak_bytes = self._peak_memory()
        yield
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self.skip()

    def _peak_memory(self) -> int:
        return max(self._peak_bytes, peak_memory(self._device))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the `with` block as the computation of a step. Time between two blocks counts towards the later step."""
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        self._inside_s += now - start
        self._whole_s += now - self._mark
        self._mark = now
        self._steps += 1
        self._done_tokens += self._tokens
        self._done_flops += self._tokens * self._flops

    def read(self, wait_s: float) -> dict[str, Any]:
        """Return averages over the steps since the last call; `wait_s` seconds of them were spent waiting for data."""
        step_s, inside_s = self._whole_s / self._steps, self._inside_s / self._steps
        flops_per_s = self._done_flops / self._whole_s
        record = {
            "step_seconds": round(step_s, 5),
            "loop_seconds": round(step_s - inside_s, 5),  # outside of forward pass, backward pass and update
            "data_wait_seconds": round(wait_s / self._steps, 5),
            "tokens_per_second_per_gpu": round(self._done_tokens / self._whole_s, 1),
            "mfu": round(flops_per_s / self._peak, 4) if self._peak else None,
            "memory_gb": round(self._peak_memory() / 1e9, 3),
        }
        self._steps, self._inside_s, self._whole_s = 0, 0.0, 0.0
        self._done_tokens = self._done_flops = 0.0
        return record


def peak_memory(device: torch.device) -> int:
    """Return the peak of bytes allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
