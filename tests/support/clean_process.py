"""Run Python programs in processes that have imported torch and transformers, but not lrnn.

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


def run(command: list[str], *, cwd: Path, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess:
    """Do what `subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)` does.

    Args:
        command: `[sys.executable, "-I", "-c", CODE, ...]` or `[sys.executable, "-I", FILE, ...]`.
    """
    python, isolated, *program = map(str, command)
    assert (python, isolated) == (sys.executable, "-I") and env["HF_HUB_OFFLINE"] == "1"
    with tempfile.TemporaryDirectory() as name:
        outputs = [f"{name}/out", f"{name}/err"]
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        request = {"program": program, "cwd": str(cwd), "env": env, "outputs": outputs}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(Path(output).read_text() for output in outputs))


@functools.cache
def _server() -> subprocess.Popen:
    """Return the process that the others are forks of. It ends with this one, whose end closes its standard input."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-I", __file__], env=env, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    import importlib

    import safetensors.torch  # noqa: F401

    for module in IMPORTED_ONCE:
        importlib.import_module(f"transformers.{module}")
    assert "lrnn" not in sys.modules
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _be_the_program(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


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
    _serve()
