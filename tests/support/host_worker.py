"""Run trainings as one process of several hosts (see two_hosts.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fork_server import redirect_output
from two_hosts import Host

from lrnn.cli import main
from lrnn.errors import UserError
from lrnn.pretrain import hosts as hosts_module
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.distributed import init_ranks
from lrnn.pretrain.launch import StopRequest
from lrnn.pretrain.train import train


def trainings(host: Host, environment: dict[str, str], output: Path, specs: list[dict[str, Any]]) -> None:
    """Run trainings one after the other, as the process that `environment` (RANK, ...) describes.

    Args:
        host: the host to be on.
        environment: variables to set.
        output: file that gets what is printed, and from every rank `["status", rank, status]`, one line of JSON each.
        specs: `{"config": {...}}`. The last rank replaces sections of it by those in "changed". If "hidden" is true,
            it has an empty folder of its own in place of the run's.
    """
    _begin(host, environment, output)
    hosts_module.SEEN_WITHIN_S = 0.2
    ranks = init_ranks()
    for spec in specs:
        is_last = ranks.rank == ranks.world_size - 1
        config = parse_config(spec["config"] | (spec.get("changed", {}) if is_last else {}), "test")
        if is_last and spec.get("hidden"):
            subprocess.run(["mount", "-t", "tmpfs", "none", config.run_dir], check=True)
        try:
            with StopRequest() as stop:
                status: int | str = train(config, ranks, stop)
        except UserError as error:
            status = str(error)
        if is_last and spec.get("hidden"):
            subprocess.run(["umount", config.run_dir], check=True)
        print(json.dumps(["status", ranks.rank, status]), flush=True)


def command(host: Host, environment: dict[str, str], output: Path, arguments: list[str]) -> None:
    """Run a command of `lrnn` as the process that `environment` (RANK, ...) describes."""
    _begin(host, environment, output)
    sys.exit(main(arguments))


def _begin(host: Host, environment: dict[str, str], output: Path) -> None:
    redirect_output(output)
    host.enter()
    torch.set_num_threads(1)
    os.environ.update(environment)
