"""Run Python programs in processes that have imported torch and transformers, but not lrnn; or an installed lrnn.

They are forks of one such process, which starts with the first of them. Each then takes some 0.1 s of CPU time to
start, not 8 s, and is otherwise what `python -I` would be.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

IMPORTED_ONCE = ("modeling_utils", "generation", "models.auto.modeling_auto", "models.auto.tokenization_auto")
# What the commands of lrnn import.
OF_LRNN = (
    *("lrnn.cli", "lrnn.pretrain.corpus.build", "lrnn.pretrain.command", "lrnn.pretrain.train"),
    *("lrnn.eval.export.command", "lrnn.eval.export.write"),
    *("lrnn.eval.suites.evaluate", "lrnn.eval.suites.harness", "deepspeed", "pandas"),
)
# Otherwise Arrow's allocator would start a thread, and a process with threads must not fork.
WITHOUT_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OMP_NUM_THREADS": "1"}
MAIN = "import sys; from lrnn.cli import main; sys.exit(main())"


def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
    """Do what `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` does.

    Args:
        command: `[sys.executable, "-I", "-c", CODE, ...]` or `[sys.executable, "-I", FILE, ...]`.
    """
    python, isolated, *program = map(str, command)
    assert (python, isolated) == (sys.executable, "-I") and env["HF_HUB_OFFLINE"] == "1"
    return _run(_server(), program, cwd, env)


def run_lrnn(*arguments: object, cwd: Path, site: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command line of the lrnn that is installed in the folder `site`, on a CPU.

    Args:
        variables: added to the environment.
    """
    env = {**os.environ, **_environment(str(site)), "CUDA_VISIBLE_DEVICES": "", **variables}
    return _run(_server(str(site)), ["-c", MAIN, *map(str, arguments)], cwd, env)


def _run(server: subprocess.Popen, program: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as name:
        outputs = [f"{name}/out", f"{name}/err"]
        assert server.stdin is not None and server.stdout is not None
        request = {"program": program, "cwd": str(cwd), "env": env, "outputs": outputs}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(program, status, *(Path(output).read_text() for output in outputs))


@functools.cache
def _server(site: str | None = None) -> subprocess.Popen:
    """Return the process that the others are forks of. It ends with this one, whose end closes its standard input.

    Args:
        site: folder of an installed lrnn to import; None for a process without lrnn.
    """
    command = [sys.executable, "-I", __file__] if site is None else [sys.executable, "-P", __file__, site]
    pipe = subprocess.PIPE
    environment = os.environ | _environment(site)
    server = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.kill)
    return server


def _environment(site: str | None) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1"}
    return offline if site is None else {**offline, **WITHOUT_THREADS, "PYTHONPATH": site}


def _serve(site: str | None) -> None:
    import importlib

    import safetensors.torch  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print while they are imported is no answer
    for module in IMPORTED_ONCE:
        importlib.import_module(f"transformers.{module}")
    if site is None:
        assert "lrnn" not in sys.modules
    for module in OF_LRNN if site is not None else ():
        importlib.import_module(module)
    assert site is None or str(sys.modules["lrnn"].__file__).startswith(site)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _be_the_program(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), file=answers, flush=True)


def _be_the_program(program: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    """Run a program as the main one of this process, and end the process."""
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _read_modules_cache_again()
    status = 0
    try:
        if program[0] == "-c":
            sys.argv = ["-c", *program[2:]]
            main = type(sys)("__main__")
            sys.modules["__main__"] = main
            exec(compile(program[1], "<string>", "exec"), vars(main))
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _read_modules_cache_again() -> None:
    """Set HF_MODULES_CACHE in all modules of transformers, which have copied its value from the environment."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "HF_MODULES_CACHE" in vars(module):
            vars(module)["HF_MODULES_CACHE"] = os.environ["HF_MODULES_CACHE"]


if __name__ == "__main__":
    _serve(*(sys.argv[1:] or [None]))
