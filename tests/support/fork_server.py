"""A process that has imported everything, from which tests fork others. A start takes 1 s, not 9 s."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

# Otherwise Arrow's allocator would start a thread, and a process with threads must not fork.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
CONTEXT = multiprocessing.get_context("forkserver")
# "deepspeed" and "pandas" are otherwise imported late in a start.
PACKAGES = ["deepspeed", "pandas", "lrnn.track.workers", "lrnn.pretrain.corpus.build"]
CONTEXT.set_forkserver_preload(["training_worker", "command_server", *PACKAGES, "frozen_imports"])


def redirect_output(file: Path) -> None:
    """Write to `file` what this process and its children print, to stdout and stderr.

    Every line is one write, so that those of several processes do not mix: with PYTHONUNBUFFERED, its end is another.
    """
    output = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)


def run_program(program: Path, output: Path, *arguments: object) -> int:
    """Run a Python file as a program in a fork, with its output in the file `output`. Return its exit status."""
    process = CONTEXT.Process(target=_become, args=(program, output, [str(argument) for argument in arguments]))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def start_lrnn(arguments: list[str], output: Path) -> multiprocessing.process.BaseProcess:
    """Start a command line of `lrnn` in a fork, with the folder and environment of this process.

    Its output goes to the file `output`.
    """
    process = CONTEXT.Process(target=_run_lrnn, args=(arguments, output, Path.cwd(), dict(os.environ)))
    process.start()
    return process


def _run_lrnn(arguments: list[str], output: Path, folder: Path, environment: dict[str, str]) -> None:
    from lrnn.cli import main

    redirect_output(output)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(main(arguments))


def _become(program: Path, output: Path, arguments: list[str]) -> None:
    redirect_output(output)
    sys.path.insert(0, str(program.parent))
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")
