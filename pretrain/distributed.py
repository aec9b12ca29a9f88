"""This process among all processes of a run: how it joins them, and how they agree."""

import faulthandler
import logging
import os
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lrnn.errors import UserError
from lrnn.pretrain.launch import free_port, local_environment, slurm_tasks
from lrnn.pretrain.metrics.start_up import StartUp
from lrnn.pretrain.network import check_network, choose_network

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # within which all processes have to start
# The limit of collectives is longer than any limit of the watchdog, which ends a run that hangs and says where.
COLLECTIVE_TIMEOUT = timedelta(days=2)
SLURM_PORTS = range(20000, 40000)  # a job meets at the port that its number gives


@dataclass
class Ranks:
    """This process among all.

    Attributes:
        rank: number of this process; 0 is the main process.
        world_size: number of processes.
        device: the device of this process.
        host_group: a gloo group for agreements on the host.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes logs and reads checkpoints for all."""
        return self.rank == 0

    def worst(self, *votes: int) -> list[int]:
        """Return, for each of the votes, the largest value of any rank: the same answer on every rank."""
        if self.world_size == 1:
            return list(votes)
        found = torch.tensor(votes)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return found.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on every rank. A value may be any picklable object of our own making."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def scatter(self, values: list[Any] | None) -> Any:
        """Return this rank's part of a list that the main process gives, of one picklable object for each rank."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        part: list[Any] = [None]
        dist.scatter_object_list(part, values, src=0, group=self.host_group)
        return part[0]

    def together(self, action: Callable[[], T]) -> T:
        """Return `action()` on every rank. If it raises UserError on any rank, raise the first one on all ranks."""
        error = None
        try:
            value = action()
        except UserError as raised:
            error = str(raised)
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            raise UserError(errors[0])
        return value

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        dist.barrier(group=self.host_group)


def init_ranks(start_up: StartUp | None = None) -> Ranks:
    """Join the other processes: over NCCL on GPUs, over gloo on CPU. A process alone forms a group of one.

    The time that imports and the meeting take is booked in `start_up`.
    """
    start_up = start_up or StartUp()
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code leaves the Python stacks in the log
    if "RANK" not in os.environ:
        if slurm_tasks() > 1:
            os.environ.update(slurm_environment(dict(os.environ)))
        else:
            os.environ.update(local_environment(0, 1, free_port()))
    device = _choose_device()
    import deepspeed  # after DS_ACCELERATOR is set

    _quieten(deepspeed)
    start_up.lap("imports")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # DeepSpeed makes groups with torch's own limit, which is 10 minutes for NCCL, and accepts no other.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
        store, rank, world_size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        choose_network()
        check_network(store, rank, world_size)
        store.set_timeout(COLLECTIVE_TIMEOUT)  # NCCL's communicators are made through the store when first used
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    deepspeed.init_distributed(verbose=False)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))
    start_up.lap("joining")
    return ranks


def slurm_environment(env: dict[str, str]) -> dict[str, str]:
    """Return the variables that torch.distributed reads, from those that srun sets (one task per GPU)."""
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": _first_host(env),
        "MASTER_PORT": str(SLURM_PORTS[int(env["SLURM_JOB_ID"]) % len(SLURM_PORTS)]),
    }


def _first_host(env: dict[str, str]) -> str:
    """Return the host of the main process. A batch script that starts a container names it in MASTER_ADDR."""
    command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except FileNotFoundError:
        if "MASTER_ADDR" not in env:
            raise UserError(
                "scontrol is not found, as in a container: set MASTER_ADDR to the job's first host before srun, as "
                "slurm/train.sbatch does"
            ) from None
        return env["MASTER_ADDR"]


def _choose_device() -> torch.device:
    """Return this process's device, made the current one. On a machine without GPUs, set DeepSpeed up for the CPU."""
    if torch.cuda.is_available():
        # srun may show a task only its own GPU; then the local rank is no index.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed imports torch's builder, which warns if CUDA's compiler is installed on a machine without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.device("cpu")


def _quieten(deepspeed: Any) -> None:
    """Turn off messages of DeepSpeed and what it would compile at every start without need."""
    deepspeed.logger.setLevel("ERROR")
    # DeepSpeed would compile an operator, for inference on CPU, at the first start if it found it compatible. A process
    # that is killed meanwhile leaves a lock behind for which every later one waits forever. The look-up itself runs
    # compilers, and makes this dictionary when it is read first.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    # DeepSpeed compiles a function of Muon, which is not used here, at every start: 2 s to load torch's compiler.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    # DeepSpeed calls names that newer versions of torch deprecate; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
