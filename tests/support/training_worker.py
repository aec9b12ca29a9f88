"""Run trainings one after the other, as one process of a group (see training_group.py).

SPEC is a list of {"config": {...}} with these optional keys:
    "stop_at": at this step the last rank gets the signal that announces a preemption; 0 means while the engine starts;
    "poison_at": at this step one gradient of the last rank becomes NaN;
    "strange_at": at this step the labels of the last rank's last micro-batch are all a token that no text has;
    "fill_at": before this step the disk of the run folder is filled up;
    "free_at": before this step it is freed again;
    "remove": [step, path]: before this step the file at this path is removed;
    "evaluation_fails_at": at this step the last rank raises an error when it is asked for scores;
    "allow_change": true resumes with a configuration that changes the results;
    "no_warm_up": true skips the discarded pass before the first step.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

from lrnn import cli
from lrnn.errors import UserError
from lrnn.eval.in_run.answers import Answers
from lrnn.pretrain import run as run_module
from lrnn.pretrain import train as train_module
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.distributed import init_ranks
from lrnn.pretrain.launch import StopRequest
from lrnn.pretrain.run import Run
from lrnn.pretraining import make_evaluator

original_step = train_module.train_step
original_start = Run._start_engine
original_warm_up = run_module.warm_up
original_answer = Answers.__call__


def command(arguments: list[str], errors: Path, environment: dict[str, str]) -> None:
    """Run a command of `lrnn` as the process that `environment` (RANK, ...) describes. Its stderr goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.exit(cli.main(arguments))


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def main(file: Path, environment: dict[str, str]) -> None:
    """Run the trainings of the SPEC in `file`, as the process that `environment` (RANK, ...) describes."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    ranks = init_ranks()
    for i, spec in enumerate(json.loads(file.read_text())):
        config = parse_config(spec["config"], "test")

        def step(engine, batches, *, spec=spec, config=config, **options):
            number = int(batches[0].sample_indices.min()) // config.global_batch_size + 1
            last = ranks.rank == ranks.world_size - 1
            if last and number == spec.get("stop_at"):
                os.kill(os.getpid(), signal.SIGUSR1)
            if last and number == spec.get("strange_at"):
                batches[-1].labels.fill_(3)  # a byte that no text has
            filler = Path(config.run_dir) / "filler"
            if ranks.is_main and number == spec.get("fill_at"):
                fill(filler)
            if ranks.is_main and number == spec.get("free_at"):
                filler.unlink()
            if ranks.is_main and [number] == spec.get("remove", [])[:1]:
                Path(spec["remove"][1]).unlink()
            handle = None
            if last and number == spec.get("poison_at"):
                parameter = engine.module.model.layers[0].mlp.up_proj.weight
                handle = parameter.register_hook(lambda grad: grad * float("nan"))
            result = original_step(engine, batches, **options)
            if handle is not None:
                handle.remove()
            return result

        def start(run, start_up, spec=spec):
            if spec.get("stop_at") == 0 and ranks.rank == ranks.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original_start(run, start_up)

        def answer(answers, job, spec=spec):
            last = ranks.rank == ranks.world_size - 1
            if last and answers._step == spec.get("evaluation_fails_at") and job[0] != "sample":
                raise ValueError("no answer\ntoday")
            return original_answer(answers, job)

        Answers.__call__ = answer
        train_module.train_step = step
        Run._start_engine = start
        run_module.warm_up = (lambda *args: None) if spec.get("no_warm_up") else original_warm_up
        try:
            with StopRequest() as stop:
                changes = spec.get("allow_change", False)
                status = train_module.train(config, ranks, stop, changes, make=make_evaluator)
        except (UserError, RuntimeError) as error:
            status = f"{type(error).__name__}: {error}"
        if ranks.is_main:
            with open(f"{file}.status", "a") as f:
                f.write(json.dumps({"run": i, "status": status}) + "\n")
