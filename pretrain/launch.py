"""Start the processes of a run on one host, pass signals on to them, and note the signals that ask a run to stop.

Nothing here needs the other processes: how they agree on anything is in `distributed`.
"""

import ctypes
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

from lrnn.errors import UserError
from lrnn.threads import usable_cores

STOPPED = 75  # exit status of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER = "LRNN_LAUNCHER"  # in the environment of launched processes: the process ID of their launcher
PR_SET_PDEATHSIG = 1  # of prctl(2)
PORTS = range(20_000, 32_768)  # Linux gives ports from 32,768 on to sockets that ask for any
PORT_TRIES = 100


def is_worker() -> bool:
    """Return whether torchrun, srun or `launch` started this process as one of several."""
    return "RANK" in os.environ or slurm_tasks() > 1


def is_first() -> bool:
    """Return whether this process starts others, or is the first of those that were started."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def slurm_tasks() -> int:
    """Return the number of tasks of the srun that started this process; 1 for `srun --pty` and outside of srun."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1


def check_worker(nproc: int | None, local_rank: int | None) -> None:
    """Check the options of a process that another launcher started.

    Args:
        nproc: the value of `--nproc`.
        local_rank: the value of `--local_rank`, which DeepSpeed's launcher appends.

    Raises:
        UserError: the launcher started another number of processes, or set another local rank.
    """
    by_rank = "RANK" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if by_rank else slurm_tasks()
    if nproc not in (None, world_size):
        starter = "a launcher such as torchrun (RANK is set)" if by_rank else "srun"
        raise UserError(
            f"--nproc {nproc} cannot be obeyed: {starter} started this process as one of {world_size}; leave --nproc "
            "out, or start a single task, which then starts the processes itself"
        )
    known = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if local_rank is not None and known is not None and int(known) != local_rank:
        raise UserError(f"--local_rank {local_rank} contradicts the environment, in which the local rank is {known}")


def check_alone(local_rank: int | None) -> None:
    """Raise UserError if a process that should start the others seems to be one of several."""
    if local_rank is not None and local_rank > 0:
        raise UserError(
            f"--local_rank {local_rank} is given, but RANK and WORLD_SIZE are not in the environment; start the "
            "processes with --nproc, torchrun, deepspeed or srun"
        )
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"mpirun started this process as one of {os.environ['OMPI_COMM_WORLD_SIZE']}, which is not supported; "
            "start the processes with --nproc, torchrun, deepspeed or srun"
        )


def choose_threads() -> None:
    """Share the cores among the processes of this host, unless OMP_NUM_THREADS says how many threads each has."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_process())


def threads_per_process(processes: int | None = None) -> int:
    """Return the number of threads that a process computes with if OMP_NUM_THREADS is not set.

    It does not depend on the load of the machine: sums that are split differently are rounded differently, and a run
    that resumes should compute the same.

    Args:
        processes: number of processes on this host; by default what the launcher of this process says.
    """
    if processes is None and "RANK" not in os.environ and slurm_tasks() > 1:
        return int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    told = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # of torchrun, of DeepSpeed
    return max(1, usable_cores() // (processes or int(told)))


def describe_idle_gpus() -> str | None:
    """Return a line if srun started fewer tasks on a node than each of them sees GPUs: a task computes on one GPU."""
    import torch

    # Such as 8(x2),4: eight tasks on each of two nodes, and four on another.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks, gpus = max(map(int, counts), default=0), torch.cuda.device_count()
    if "RANK" in os.environ or not 0 < tasks < gpus:
        return None
    return (
        f"srun started {tasks} tasks per node, which use {tasks} of its {gpus} GPUs; --ntasks-per-node {gpus} uses all"
    )


def default_processes() -> int:
    """Return the number of processes to start: one per visible GPU, or one if there is no GPU."""
    import torch

    return max(1, torch.cuda.device_count())


def check_world(n: int) -> None:
    """Raise UserError if `--nproc` is below 1 or above the number of visible GPUs."""
    import torch

    if n < 1:
        raise UserError(f"--nproc {n} should be at least 1")
    if torch.cuda.is_available() and n > torch.cuda.device_count():
        raise UserError(f"--nproc {n} is more than the {torch.cuda.device_count()} visible GPUs")


def launch(n: int, command: list[str]) -> int:
    """Run a command as n processes on this host, pass on stop signals, and return the exit status of the job.

    If a process fails, its failure is printed to stderr and the others are stopped, since they would wait for it.

    torchrun is not used here because it kills its workers 30 s after a signal, which is too short to save a large
    model.
    """
    port = free_port()
    threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_process(n)))
    workers: list[subprocess.Popen] = []

    def forward(number, frame):
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in STOP_SIGNALS}
    try:
        for i in range(n):
            environment = {**os.environ, **local_environment(i, n, port), "OMP_NUM_THREADS": threads}
            environment[LAUNCHER] = str(os.getpid())
            # Each worker has its own session: otherwise it would get Ctrl-C twice, from the terminal and from here.
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
    # A process that was stopped because another one failed has a negative code; the failure itself is returned.
    return next((c for c in codes if c > 0 and c != STOPPED), next((c for c in codes if c != 0), 0))


def end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when the launcher that started it dies in any way.

    Otherwise the run would continue unseen and hold its folder. Processes that `launch` did not start are left alone.
    """
    if LAUNCHER not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(os.environ[LAUNCHER]):  # the launcher died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def local_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torch.distributed reads, for one of `world_size` processes on this host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """Return a port of this host that nothing listens on.

    It is below those that the system gives to sockets without a port of their own. Such a socket could take the port
    before the main process listens on it.
    """
    for _ in range(PORT_TRIES):
        port = random.SystemRandom().choice(PORTS)  # processes that ask at once, with equal seeds, get different ones
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:  # in use
                continue
            return port
    raise UserError(f"found no free port of 127.0.0.1 among {PORT_TRIES} from {PORTS[0]} to {PORTS[-1]}")


class StopRequest:
    """Note stop signals within a `with` block. The training loop acts on them after a step, on all ranks together.

    Attributes:
        signal: name of the last stop signal, or None if none came.
    """

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


def _report(failed: dict[int, int]) -> None:
    """Print which processes failed and how. Status 2 is left out: it means bad input, which the process has named."""
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
