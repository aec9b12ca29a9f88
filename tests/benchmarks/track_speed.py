"""Measure steps per second of every model of a grid: launched kernel by kernel, as a CUDA graph, several at once.

python tests/benchmarks/track_speed.py configs/track/parity.yaml [key.sub=value ...] [--profile]
"""

import dataclasses
import sys
import time

import torch

from lrnn.track.grid import load_grid
from lrnn.track.training import EAGER_STEPS, Training

STEPS, AT_ONCE = 100, 6
DEVICE = torch.device("cuda", 0)


def warm(cell, graphs: bool) -> tuple[Training, torch.cuda.Stream]:
    """Return a training after its first steps, and its stream."""
    stream = torch.cuda.Stream(DEVICE)
    settings = cell.train.model_copy(update={"cuda_graphs": graphs})
    with torch.cuda.stream(stream):
        training = Training(dataclasses.replace(cell, train=settings), DEVICE)
        training.run(EAGER_STEPS + 2)
    torch.cuda.synchronize()
    return training, stream


def steps_per_second(trainings, steps: int = STEPS) -> float:
    """Return the steps per second of all trainings together, each on its own stream."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        for training, stream in trainings:
            with torch.cuda.stream(stream):
                training.run(1)
    torch.cuda.synchronize()
    return steps * len(trainings) / (time.perf_counter() - start)


def profile(training, stream, steps: int = 10) -> None:
    """Print where the GPU's time goes in a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found, torch.cuda.stream(stream):
        training.run(steps)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in rows) / 1e3 / steps
    count = sum(e.count for e in rows) / steps
    print(f"    {total:.2f} ms of kernels per step, {count:.0f} of them")
    for e in rows[:9]:
        print(f"    {e.self_device_time_total / 1e3 / steps:7.3f} ms {e.count / steps:6.1f} x  {e.key[:90]}")


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--profile"]
    _, cells = load_grid(arguments[0], ["seeds=[0]", *arguments[1:]])
    print(f"{torch.cuda.get_device_name(DEVICE)}, torch {torch.__version__}; training steps per second")
    print(f"{'model':18} {'eigenvalues':12} {'plain loop':>10} {'graph':>8} {f'{AT_ONCE} at once, all':>18}")
    for cell in cells:
        if cell.range == "positive":
            continue
        eager = steps_per_second([warm(cell, False)], 30)
        one = warm(cell, True)
        graph = steps_per_second([one])
        together = steps_per_second([one, *(warm(cell, True) for _ in range(AT_ONCE - 1))], 50)
        print(f"{cell.model_name:18} {cell.range:12} {eager:10.1f} {graph:8.1f} {together:18.1f}", flush=True)
        if "--profile" in sys.argv:
            profile(*one)


if __name__ == "__main__":
    main()
