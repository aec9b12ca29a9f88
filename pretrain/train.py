"""Pretrain a model, or resume a run from its newest checkpoint.

Started by hand, or as the only task of srun, it runs one process for each visible GPU (one process without GPUs); under
torchrun, deepspeed or an srun of several tasks it joins the others. SIGTERM, SIGUSR1 and Ctrl-C finish the step, write
a checkpoint and exit with status 75.
"""

import argparse
import sys

import torch.distributed as dist

from lrnn.errors import UserError
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.deepspeed_config import deepspeed_config
from lrnn.pretrain.distributed import Ranks, init_ranks
from lrnn.pretrain.guard import Verdict
from lrnn.pretrain.launch import (
    StopRequest,
    check_alone,
    check_worker,
    check_world,
    choose_threads,
    default_processes,
    describe_idle_gpus,
    end_with_launcher,
    is_first,
    is_worker,
    launch,
)
from lrnn.pretrain.metrics.start_up import StartUp, process_age_s
from lrnn.pretrain.old_config import notice
from lrnn.pretrain.run import Run
from lrnn.pretrain.step import train_step


def train(
    config: Config, ranks: Ranks, stop: StopRequest, allow_change: bool = False, start_up: StartUp | None = None
) -> int:
    """Run the training loop. With `allow_change`, a run may resume with settings that change its results.

    The time until the first step is booked in `start_up`, after what it holds.

    Returns:
        0 when the last step is done, `STOPPED` when `stop` ended the run early.

    Raises:
        UserError: on all ranks, if anything is wrong with the run, its data or its storage. A checkpoint holds the
            steps done so far, unless the storage is at fault.
    """
    with Run.open(config, ranks, stop, allow_change, start_up) as run:
        while not run.finished:
            with run.phase("waiting for data"):
                batches = run.next_batches()
            if batches is None:  # A signal came or data failed; all ranks agree.
                break
            with run.phase("computing the step"), run.measuring():
                step = train_step(run.engine, batches, lr=run.learning_rate(), limit=run.guard.limit)
            if run.judge(step, batches) is Verdict.ROLL_BACK and run.roll_back():
                continue
            run.measure(step)
            run.save_if_due()
        return run.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--nproc", type=int, help="processes on this host; default one per visible GPU")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    parser.add_argument(
        "--allow-change", action="store_true", help="resume with changed settings although they change the results"
    )
    parser.epilog = "example:\n  lrnn pretrain configs/340m.yaml run_dir=runs/340m optim.lr=2e-4"


def main(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    if is_worker():
        try:
            check_worker(args.nproc, args.local_rank)
        except UserError:
            if is_first():
                raise
            return 2  # The first process prints the message.
        if (idle := describe_idle_gpus()) is not None:
            notice(idle)
    else:
        check_alone(args.local_rank)
        processes = default_processes() if args.nproc is None else args.nproc
        check_world(processes)
        load_model_of(config)  # Cheap checks come before processes start.
        deepspeed_config(config, processes)
        if processes > 1:
            options = ["--allow-change"] if args.allow_change else []
            command = [sys.executable, "-m", "lrnn.cli", "pretrain", args.config, *args.overrides, *options]
            return launch(processes, command)
    with StopRequest() as stop:  # Before everything that takes long, so that an early signal is not a failure.
        end_with_launcher()
        choose_threads()
        start_up = StartUp(process_age_s())
        ranks = init_ranks(start_up)
        try:
            return train(config, ranks, stop, args.allow_change, start_up)
        except UserError:
            if ranks.is_main:
                raise
            return 2  # The main process prints the message.
        finally:
            dist.destroy_process_group()
            try:
                sys.stdout.flush()
            except OSError:  # The disk of the log is full. Python would exit with 120, but batch scripts expect 75.
                sys.stdout = None
