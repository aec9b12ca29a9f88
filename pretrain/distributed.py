"""Processes: who they are, how they start, how they agree to stop."""

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from lrnn.errors import UserError

STOPPED = 75  # exit status of a run that was told to stop and can be resumed (EX_TEMPFAIL of sysexits.h)
T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER = "LRNN_LAUNCHER"  # in the environment of launched processes: the process number of their launcher
PR_SET_PDEATHSIG = 1  # of prctl(2)
RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # for all processes to have started
# Of collectives: longer than any limit of the watchdog, which ends a run that hangs and says where.
COLLECTIVE_TIMEOUT = timedelta(days=2)


@dataclass
class Ranks:
    """This process among all: `rank` of `world_size`, its device, and a gloo group for agreements on the host."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def worst(self, *votes: int) -> list[int]:
        """The largest of every rank's value, for each of the votes: the same answer everywhere."""
        if self.world_size == 1:
            return list(votes)
        found = torch.tensor(votes)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return found.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The list of every rank's value, on every rank (any picklable object of our own making)."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """`action()` on every rank. Where one raises UserError, all raise the first one, and none waits for it."""
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
        dist.barrier(group=self.host_group)


def is_worker() -> bool:
    """Whether torchrun, srun or `launch` started this process as one of several."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ


def slurm_environment(env: dict[str, str]) -> dict[str, str]:
    """What torch.distributed reads, from what srun sets (one task a GPU)."""
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(20000 + int(env["SLURM_JOB_ID"]) % 20000),
    }


def init_ranks() -> Ranks:
    """Join the other processes: NCCL on GPUs, gloo on CPU. A process alone forms a group of one."""
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code leaves the Python stacks in the log
    if "RANK" not in os.environ:
        if "SLURM_STEP_ID" in os.environ:
            os.environ.update(slurm_environment(dict(os.environ)))
        else:
            os.environ.update(_local_environment(0, 1, _free_port()))
    if torch.cuda.is_available():
        # srun may show a task its own GPU alone; then the local rank is no index.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed imports torch's builder, which warns where CUDA's compiler is installed and no GPU is there.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed  # after DS_ACCELERATOR is set

    deepspeed.logger.setLevel("ERROR")
    # An operator for inference on CPU, which DeepSpeed would compile at the first start. A process that is killed
    # meanwhile leaves a lock behind for which every later one waits without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed compiles a function of Muon, which is not used here, at every start: 2 s to load torch's compiler.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    # DeepSpeed calls names that newer versions of torch deprecate; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # DeepSpeed makes groups with torch's own limit, which is 10 minutes for NCCL, and takes no other.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
        store, rank, world_size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)  # NCCL's communicators are made through it, when first used
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    deepspeed.init_distributed(verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def default_processes() -> int:
    """One process a visible GPU; one where there is none."""
    return max(1, torch.cuda.device_count())


def launch(n: int, command: list[str]) -> int:
    """Run a command as n processes on this host, pass on stop signals, and return the job's exit status.

    torchrun is not used here because it ends its workers 30 s after a signal, which is too short to save a large model.
    If a process fails, it is named on stderr and the others are stopped: they would wait for it.
    """
    port = _free_port()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n)))
    workers: list[subprocess.Popen] = []

    def forward(number, frame):
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in STOP_SIGNALS}
    try:
        for i in range(n):
            environment = {**os.environ, **_local_environment(i, n, port), "OMP_NUM_THREADS": threads}
            environment[LAUNCHER] = str(os.getpid())
            # A session of its own: otherwise Ctrl-C would reach a worker twice, from the terminal and from here.
            workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
        while True:
            ended = {i: code for i, w in enumerate(workers) if (code := w.poll()) is not None}
            failed = {i: code for i, code in ended.items() if code not in (0, STOPPED)}
            _report(failed)
            if failed or len(ended) == n:
                break
            time.sleep(0.1)
    finally:
        _stop(workers)
        for number, handler in previous.items():
            signal.signal(number, handler)
    codes = [w.returncode for w in workers]
    # A process that was ended for another's failure has a negative code: report the failure itself.
    return next((c for c in codes if c > 0 and c != STOPPED), next((c for c in codes if c != 0), 0))


def end_with_launcher() -> None:
    """Get SIGTERM when the process that `launch`ed this one dies in any way; does nothing in other processes.

    Left alone, a run would go on unseen and hold its folder.
    """
    if LAUNCHER not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(os.environ[LAUNCHER]):  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


def _report(failed: dict[int, int]) -> None:
    """Name the processes that failed, with their exit statuses, unless it was for bad input, which names itself."""
    for i, code in failed.items():
        if code < 0:
            print(f"lrnn: process {i} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        elif code != 2:
            print(f"lrnn: process {i} ended with status {code}", file=sys.stderr)


def _stop(workers: list[subprocess.Popen], grace_s: float = 10) -> None:
    for signal_name in ("terminate", "kill"):
        for worker in workers:
            if worker.poll() is None:
                getattr(worker, signal_name)()
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and any(w.poll() is None for w in workers):
            time.sleep(0.1)


def _local_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class StopRequest:
    """Notes a stop signal; the loop acts on it at the end of a step, on all ranks together."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> "StopRequest":
        def note(number, frame):
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt  # a second Ctrl-C stops at once
            self.signal = signal.Signals(number).name

        self._previous = {s: signal.signal(s, note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_world(n: int) -> None:
    """Raises UserError where `--nproc` asks for what is not there."""
    if n < 1:
        raise UserError(f"--nproc {n} should be at least 1")
    if torch.cuda.is_available() and n > torch.cuda.device_count():
        raise UserError(f"--nproc {n} is more than the {torch.cuda.device_count()} visible GPUs")
