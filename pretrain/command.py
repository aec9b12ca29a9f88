"""Pretrain a model, or resume a run from its newest checkpoint.

Started by hand, or as the only task of srun, it runs one process for each visible GPU (one process without GPUs); under
torchrun, deepspeed or an srun of several tasks it joins the others. SIGTERM, SIGUSR1 and Ctrl-C finish the step, write
a checkpoint and exit with status 75.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lrnn.errors import UserError
from lrnn.pretrain.checkpoint.format import samples_consumed
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.deepspeed_config import deepspeed_config
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
from lrnn.pretrain.stages import naming, stages_left

if TYPE_CHECKING:  # It imports the model, which a process that starts others does without.
    from lrnn.pretrain.watch.protocol import MakeEvaluator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    parser.add_argument("--nproc", type=int, help="processes on this host; default one per visible GPU")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    parser.add_argument(
        "--allow-change", action="store_true", help="resume with changed settings although they change the results"
    )
    parser.epilog = "example:\n  lrnn pretrain configs/340m.yaml run_dir=runs/340m optim.lr=2e-4"


def main(args: argparse.Namespace, make: "MakeEvaluator | None" = None) -> int:
    """Run the command. `make` makes what evaluates the model between steps."""
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
        for stage in stages_left(config, samples_consumed(Path(config.run_dir))):
            with naming(stage, config):
                deepspeed_config(stage.config, processes)
        if processes > 1:
            end_with_launcher()  # `lrnn ladder` may have started this process, which passes the signal on
            options = ["--allow-change"] if args.allow_change else []
            command = [sys.executable, "-m", "lrnn.cli", "pretrain", args.config, *args.overrides, *options]
            return launch(processes, command)
    with StopRequest() as stop:  # Before everything that takes long, so that an early signal is not a failure.
        end_with_launcher()
        choose_threads()
        return _train(config, stop, args.allow_change, make)


def _train(config: Config, stop: StopRequest, allow_change: bool, make: "MakeEvaluator | None") -> int:
    """Join the other processes and train. Return the exit status."""
    # The model and what it needs are imported here: a process that starts others does without them.
    import torch.distributed as dist

    from lrnn.pretrain.distributed import init_ranks
    from lrnn.pretrain.train import train

    start_up = StartUp(process_age_s())
    try:
        return train(config, init_ranks(start_up), stop, allow_change, start_up, make)
    except UserError:
        if is_first():
            raise
        return 2  # The main process prints the message.
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        try:
            sys.stdout.flush()
        except OSError:  # The disk of the log is full. Python would exit with 120, but batch scripts expect 75.
            sys.stdout = None
