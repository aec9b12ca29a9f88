"""Run several trainings that hang, side by side: `hanging_worker.py SPECS.json`.

Packages are imported once, and the ranks of every run are forks. The tests run this file as a fork, too.

SPECS maps a name to {"config": {...}, "at_step_3": [what each rank does while it fetches the data of step 3]}:
    "": continues; "stop": SIGSTOP to itself; "crash": SIGSEGV to itself; "sleep": never returns;
    "raise": RuntimeError, and the process stays; "pause": sleeps 3 s, and in the first second all ranks are suspended
    for PAUSE_S.
Each rank writes to NAME/RANK.out and NAME/RANK.err beside SPECS. NAME/ended.json is {"status": [of each rank; null for
one that was left over], "seconds": from the first action to the last end}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
# Training imports these late, which takes seconds; here they are imported once for all ranks.
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch

from lrnn.pretrain.config import parse_config
from lrnn.pretrain.data.loader import Loader
from lrnn.pretrain.distributed import init_ranks
from lrnn.pretrain.launch import StopRequest, free_port
from lrnn.pretrain.train import train

DEADLINE_S = 90
PAUSE_S = 6
STUCK = ("stop", "raise")  # actions after which a process does not end by itself


def forget_the_time() -> None:
    while True:
        time.sleep(1)


def act(action: str, mark: Path) -> None:
    time.sleep(1)  # until the others know where this rank is
    mark.touch()
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif action == "sleep":
        forget_the_time()
    elif action == "raise":
        raise RuntimeError("the disk is broken")
    elif action == "pause":
        for _ in range(30):
            time.sleep(0.1)


def be_rank(rank: int, spec: dict, port: int, folder: Path) -> None:
    """Run one rank. Never returns."""
    actions = spec["at_step_3"]
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(actions)))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    original, fetched = Loader.__next__, 0

    def fetch(self):
        nonlocal fetched
        fetched += 1
        if fetched == 3 and actions[rank]:
            act(actions[rank], folder / f"{rank}.mark")
        return original(self)

    Loader.__next__ = fetch
    status = 1
    try:
        with StopRequest() as stop:
            ranks = init_ranks()
            for group in (torch.distributed.group.WORLD, ranks.host_group, torch.distributed.new_group()):
                print(f"collectives end after {group._get_backend(ranks.device).options._timeout}")
            status = train(parse_config(spec["config"], "test"), ranks, stop)
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        print(f"RuntimeError: {error}", file=sys.stderr, flush=True)
        if actions[rank] == "raise":
            forget_the_time()
    finally:
        sys.stdout.flush()
        os._exit(status)


class Run:
    """The processes of a run."""

    def __init__(self, spec: dict, folder: Path):
        self.folder, self.actions = folder, spec["at_step_3"]
        self.status: dict[int, int] = {}
        self.last_end = 0.0
        self.paused_at: float | None = None
        folder.mkdir()
        port = free_port()
        self.processes = []
        for rank in range(len(self.actions)):
            process = os.fork()
            if process == 0:
                be_rank(rank, spec, port, folder)
            self.processes.append(process)

    def look(self) -> bool:
        """Note which ranks have ended, and suspend those that the specification names; return whether all ended."""
        for rank, process in enumerate(self.processes):
            if rank not in self.status:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.status[rank], self.last_end = os.waitstatus_to_exitcode(status), time.time()
        if self.paused_at is None and "pause" in self.actions and len(list(self.folder.glob("*.mark"))) == 2:
            self.paused_at = time.time()
            self._signal(signal.SIGSTOP)
        if self.paused_at is not None and time.time() > self.paused_at + PAUSE_S:
            self._signal(signal.SIGCONT)
        return len(self.status) == len(self.processes)

    def _signal(self, number: signal.Signals) -> None:
        for rank, process in enumerate(self.processes):
            if rank not in self.status:
                os.kill(process, number)

    def end(self) -> None:
        """Kill the remaining processes, and write down how the run ended."""
        self._signal(signal.SIGKILL)
        status = [self.status.get(rank) for rank in range(len(self.processes))]
        began = min((mark.stat().st_mtime for mark in self.folder.glob("*.mark")), default=0.0)
        ended = {"status": status, "seconds": self.last_end - began}
        (self.folder / "ended.json").write_text(json.dumps(ended))


def main() -> None:
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    runs = [Run(spec, file.parent / name) for name, spec in json.loads(file.read_text()).items()]
    deadline = time.time() + DEADLINE_S
    while not all([run.look() for run in runs]) and time.time() < deadline:
        # Only processes that cannot end by themselves remain.
        others = [r for run in runs for r, a in enumerate(run.actions) if r not in run.status and a not in STUCK]
        if not others and time.time() > max(run.last_end for run in runs) + 1:
            break
        time.sleep(0.05)
    for run in runs:
        run.end()


main()
