"""`lrnn ladder` in a process that has imported what it needs. Its commands, and their own processes, are forks of it.

A command with six cells starts 13 processes, which would take 9 s each to import everything.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from fork_server import CONTEXT, redirect_output

from lrnn.pretrain.launch import LAUNCHER, STOP_SIGNALS


class Fork:
    """A command line of `lrnn` in a fork of this process, with what `subprocess.Popen` has and ladders use."""

    def __init__(self, arguments: list[str], log: Path | None, variables: dict[str, str]):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_lrnn(arguments, log, variables)

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        return self._look(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def start(arguments: list[str], log: Path | None = None, **variables: str) -> Fork:
    """Stand in for `lrnn.ladder.processes.start`."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    return Fork(arguments, log, {**variables, LAUNCHER: str(os.getpid())})


def _be_lrnn(arguments: list[str], log: Path | None, variables: dict[str, str]) -> None:
    """Do what a new process with this command line would do, and end."""
    status = 1
    try:
        os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(variables)
        if log is not None:
            redirect_output(log)
        from lrnn.cli import main

        status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(pipe: Connection) -> None:
    """Start command lines and wait for them, as `Ladders` asks for."""
    import deepspeed  # noqa: F401
    import torch

    import lrnn.eval.export.check as export_check
    import lrnn.ladder.cell
    import lrnn.ladder.report.write
    import lrnn.pretrain.train  # noqa: F401
    from lrnn.ladder import processes
    from lrnn.tokenizer import load_tokenizer

    processes.start = start
    torch.set_num_threads(1)  # OMP_NUM_THREADS counts only before torch is imported
    # Whether exports load without lrnn is tested elsewhere.
    export_check._load_without_lrnn = lambda folder, batch, texts: (
        export_check._load_with_lrnn(folder, batch),
        load_tokenizer(folder).encode_batch(texts),
    )
    children: dict[int, Fork] = {}
    while (request := pipe.recv()) is not None:
        if isinstance(request, int):
            pipe.send(children.pop(request).wait())
        else:
            fork = Fork(*request)
            children[fork.pid] = fork
            pipe.send(fork.pid)


@dataclass
class Command:
    """A command line that was started."""

    pid: int
    log: Path
    _pipe: Connection

    def wait(self) -> int:
        """Return the exit status, when the command has ended."""
        self._pipe.send(self.pid)
        return self._pipe.recv()

    @property
    def output(self) -> str:
        return self.log.read_text()


@dataclass
class Ladders:
    """Starts command lines of `lrnn`, one after the other, whose outputs go to files in a folder."""

    folder: Path
    _pipe: Connection
    _count: int = 0

    def start(self, *arguments: object) -> Command:
        self._count += 1
        log = self.folder / f"command-{self._count}.txt"
        self._pipe.send(([str(argument) for argument in arguments], log, {"OMP_NUM_THREADS": "1"}))
        return Command(self._pipe.recv(), log, self._pipe)

    def run(self, *arguments: object) -> Command:
        """Run a command line, which has to succeed."""
        command = self.start(*arguments)
        assert command.wait() == 0, command.output
        return command


@contextmanager
def ladders(folder: Path) -> Iterator[Ladders]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield Ladders(folder, ours)
    finally:
        ours.send(None)
        process.join()
