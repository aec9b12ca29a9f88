"""Run `lrnn bench step` for a tiny run on a CPU, in a process of its own, with what needs a GPU replaced."""

import argparse
import gc
import json
import os
import weakref
from pathlib import Path

import torch
from fork_server import redirect_output

from lrnn.bench import step as bench_step
from lrnn.pretrain.config import load_config, load_model_of
from lrnn.pretrain.data.micro_batch import MicroBatch
from lrnn.pretrain.distributed import init_ranks

EVENT = {"ph": "X", "cat": "kernel", "name": "nvjet_a", "ts": 0.0, "dur": 3000.0}


def main(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Measure a step. Times are those of the CPU, and the profile is one recorded kernel.

    Writes what is printed to `output` in the folder, the figures to `figures.json`, and facts on each step to
    `facts.json`.

    Args:
        arguments: configuration and overrides, as for `lrnn bench step`.
        folder: where to write to.
        environment: RANK and the like of this process.
    """
    redirect_output(folder / "output")
    torch.set_num_threads(1)
    os.environ.update(environment)
    ranks = init_ranks()
    config = load_config(arguments[0], arguments[1:])
    weights, models, steps = [], [], []
    build_engine, train_step = bench_step.build_engine, bench_step.train_step

    def built(model, *args):
        models.append(weakref.ref(model))
        return build_engine(model, *args)

    def counted(engine, batches: list[MicroBatch], **options):
        done = train_step(engine, batches, **options)
        weights.append([p.detach().clone() for p in engine.module.parameters()])
        steps.append([len(batches), done.loss, done.lr, float(engine.get_global_grad_norm())])
        return done

    def recorded(step, count):
        for _ in range(count):
            step()
        return [EVENT]

    bench_step.build_engine, bench_step.train_step, bench_step.profile = built, counted, recorded
    bench_step.environment = lambda: {"GPU": "none"}
    torch.cuda.get_device_name = lambda device: "NVIDIA H200"
    options = argparse.Namespace(only_ours=True, verbose=True, json=folder / "figures.json")
    bench_step.measure_and_print(config, load_model_of(config), ranks, options)
    gc.collect()
    same = all(torch.equal(a, b) for later in weights[1:] for a, b in zip(weights[0], later, strict=True))
    facts = {"same_weights": same, "freed": models[0]() is None, "steps": steps}
    (folder / "facts.json").write_text(json.dumps(facts))
