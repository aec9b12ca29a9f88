"""Run command lines of `lrnn` in a process beside the tests."""

import os
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection

import torch

from lrnn.cli import main


def run(arguments: list[str]) -> int:
    """Return the exit status that `python -m lrnn.cli` would have."""
    environment = dict(os.environ)
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    finally:  # `init_ranks` adds this process's place among all
        os.environ.clear()
        os.environ.update(environment)


def captured(arguments: list[str]) -> tuple[int, str, str]:
    """Return status, stdout and stderr, including what libraries write without Python."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            status = run(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def serve(pipe: Connection) -> None:
    """Run each list of arguments that comes through the pipe, and send its `captured`, until None comes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # `lrnn pretrain` would use all cores
    torch.set_num_threads(1)
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed cannot begin a second one
    while (arguments := pipe.recv()) is not None:
        pipe.send(captured(arguments))
