"""Test what a program in the sandbox can do, with the real kernel."""

import itertools
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from lrnn.errors import UserError
from lrnn.eval.suites import sandbox


def test_a_program_passes_only_if_it_reaches_its_end():
    assert sandbox.run("assert 1 + 1 == 2").passed
    failed = sandbox.run("assert 1 + 1 == 3")
    assert not failed.passed and "AssertionError" in failed.stderr and not failed.timed_out
    assert not sandbox.run("import sys; sys.exit(0)\nassert False").passed
    assert not sandbox.run("import os; os._exit(0)").passed
    assert not sandbox.run("def f(:").passed
    assert not sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").passed
    assert sandbox.run("print('x' * (64 << 20))").passed, "output is thrown away, not kept in memory"


def test_a_sandbox_in_which_nothing_passes_is_found_before_an_evaluation(monkeypatch):
    sandbox.check()
    for outcome, why in (
        (sandbox.Outcome(False, True, ""), "an empty program takes more than 10 s"),
        (sandbox.Outcome(False, False, "Traceback\nMemoryError\n"), r"an empty program fails \(MemoryError\)"),
    ):
        monkeypatch.setattr(sandbox, "run", lambda program, outcome=outcome: outcome)
        with pytest.raises(UserError, match=why):
            sandbox.check()


def test_a_process_that_cannot_start_leaves_no_descriptor(monkeypatch):
    def fail(*arguments, **options):
        raise BlockingIOError("no process is left")

    monkeypatch.setattr(sandbox.subprocess, "Popen", fail)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockingIOError):
        sandbox.run("")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_endless_loop_is_killed_at_the_time_limit():
    start = time.monotonic()
    outcome = sandbox.run("while True: pass", timeout_s=1.0)
    assert outcome.timed_out and not outcome.passed
    assert time.monotonic() - start < 4


def test_memory_is_limited():
    program = "x = bytearray({})\nx[::4096] = b'1' * len(x[::4096])"
    assert sandbox.run(program.format(100 << 20), memory_bytes=512 << 20).passed
    outcome = sandbox.run(program.format(1 << 30), memory_bytes=512 << 20)
    assert not outcome.passed and "MemoryError" in outcome.stderr


def test_files_are_limited():
    outcome = sandbox.run(f"open('a', 'wb').write(b'0' * {2 * sandbox.FILE_BYTES})")
    assert "File too large" in outcome.stderr
    fill = "for i in range(20): open(str(i), 'wb').write(b'0' * (10 << 20))"
    assert "No space left" in sandbox.run(fill).stderr


FORK_AND_WAIT = """
import os, sys, time
read, write = os.pipe()  # closed by exec, so that reading ends when the other program runs
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-c", "import time; time.sleep(60) # {token}"])
    os._exit(0)
os.close(write)
os.read(read, 1)
{then}
"""


@pytest.mark.parametrize("then", ["", "time.sleep(60)"], ids=["after the end", "at the time limit"])
def test_nothing_outlives_the_program(then):
    token = uuid.uuid4().hex
    start = time.monotonic()
    outcome = sandbox.run(FORK_AND_WAIT.format(token=token, then=then), timeout_s=3.0)
    assert outcome.passed is (then == "") and outcome.timed_out is (then != ""), outcome
    assert time.monotonic() - start < 20, "waited for what the program left behind"
    deadline = time.monotonic() + 2
    while alive := [p for p in Path("/proc").glob("[0-9]*/cmdline") if token in _read(p)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def _read(path):
    try:
        return path.read_text()
    except OSError:  # the process has ended in the meantime
        return ""


FORK_BOMB = """
import ctypes, os
ctypes.CDLL(None).prctl(15, b"{name}", 0, 0, 0)  # PR_SET_NAME: what /proc/PID/comm says, of children too
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def test_a_fork_bomb_is_held_and_ended():
    name = uuid.uuid4().hex[:15]
    outcomes: list[sandbox.Outcome] = []
    program = FORK_BOMB.format(name=name)
    running = threading.Thread(target=lambda: outcomes.append(sandbox.run(program, timeout_s=2.0)))
    running.start()
    most = 0
    while running.is_alive():
        most = max(most, _count(name))
        time.sleep(0.05)
    assert outcomes[0].timed_out and not outcomes[0].passed
    assert 8 < most <= sandbox.PROCESSES, f"{most} processes at once"
    deadline = time.monotonic() + 5
    while alive := _count(name):
        assert time.monotonic() < deadline, f"{alive} are still running"
        time.sleep(0.05)


def _count(name: str) -> int:
    return sum(_read(path).strip() == name for path in Path("/proc").glob("[0-9]*/comm"))


@pytest.fixture
def short_folder():
    """Return a folder with a short path: the path of a socket has 107 characters at most, which tmp_path may exceed."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize("family", ["internet", "abstract unix", "unix"])
def test_no_network_not_even_to_this_machine(family, short_folder):
    if family == "internet":
        server = socket.create_server(("127.0.0.1", 0))
        address = server.getsockname()
        connect = f"socket.create_connection({address!r}, timeout=2)"
    else:
        server = socket.socket(socket.AF_UNIX)
        address = f"\0lrnn-{uuid.uuid4().hex}" if family == "abstract unix" else f"{short_folder}/socket"
        server.bind(address)
        server.listen()
        connect = f"socket.socket(socket.AF_UNIX).connect({address!r})"
    with server:
        server.settimeout(0.1)
        program = f"import socket\n{connect}"
        assert not sandbox.run(program).passed
        with pytest.raises(TimeoutError):
            server.accept()
        exec(program)  # outside the sandbox the same lines get through, so the refusal above was the sandbox's
        server.accept()[0].close()


def test_sees_no_file_of_the_machine_except_python(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    monkeypatch.setenv("LRNN_SECRET", "s3cret")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ")):
        assert path.exists()
        outcome = sandbox.run(f"open({str(path)!r}).read()")
        assert "FileNotFoundError" in outcome.stderr, path
    assert sandbox.run("import os; assert os.path.exists('/tmp/program.py') and os.getcwd() == '/tmp'").passed
    assert sandbox.run("import os; assert 'LRNN_SECRET' not in os.environ and 'PATH' not in os.environ").passed
    home = sandbox.run(f"import os; print(os.listdir({str(Path.home())!r})); assert 0").stderr
    hidden = [p.name for p in Path.home().iterdir() if not sys.base_prefix.startswith(str(p))]
    assert not any(name in home for name in hidden)


def test_the_home_directory_can_be_neither_read_nor_written():
    with tempfile.NamedTemporaryFile("w+", dir=Path.home(), prefix=".lrnn-test-") as secret:
        secret.write("s3cret")
        secret.flush()
        assert Path(secret.name).read_text() == "s3cret"
        for program in (
            f"open({secret.name!r}).read()",
            f"open({secret.name!r}, 'w')",
            f"open({str(Path.home() / '.lrnn-was-here')!r}, 'w')",
            "import pathlib; open(pathlib.Path.home() / '.lrnn-was-here', 'w')",
            f"import os; os.chdir('/'); [os.chdir('..') for _ in range(9)]; open('.' + {secret.name!r})",
            f"import os; os.link({secret.name!r}, '/tmp/a')",
        ):
            outcome = sandbox.run(program)
            assert not outcome.passed and "Error" in outcome.stderr, program
        assert Path(secret.name).read_text() == "s3cret" and not (Path.home() / ".lrnn-was-here").exists()


def test_cannot_write_outside_tmp_nor_gain_rights():
    for folder in ("/usr", "/", sys.prefix, sys.base_prefix):
        assert not sandbox.run(f"open({folder!r} + '/lrnn-was-here', 'w')").passed, folder
    new_user_namespace = "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0"
    assert not sandbox.run(new_user_namespace).passed
    assert sandbox.run("import os; assert os.getuid() == os.geteuid() == os.getgid() == 65534").passed


def test_nothing_runs_if_the_kernel_refuses(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("raise PermissionError(1, 'unshare: Operation not permitted')")
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(UserError, match=r"was not run.*Operation not permitted"):
        sandbox.run("pass")


def test_programs_are_counted_where_that_is_asked_for(capsys):
    with sandbox.counting(3):
        assert capsys.readouterr().err == "", "the bar appears with the first program"
        sandbox.pass_at_k(["assert x == 1"] * 3, [["x = 1"], ["x = 1"], ["x = 2"]], 1)
    shown = capsys.readouterr().err
    assert "running programs" in shown and "3/3" in shown
    sandbox.pass_at_k(["assert x == 1"], [["x = 1"]], 1)
    assert capsys.readouterr().err == ""


def test_pass_at_k_is_the_share_of_draws_with_a_passing_program():
    good, bad = "x = 1", "x = 2"
    candidates = [good, bad, bad, good, bad]
    for k in (1, 2, 3, 4):
        draws = list(itertools.combinations(candidates, k))
        expected = sum(good in draw for draw in draws) / len(draws)
        assert sandbox.pass_at_k(["assert x == 1"], [candidates], k) == pytest.approx(expected)
    assert sandbox.pass_at_k(["assert x == 1"] * 2, [[good], [bad]], 1) == 0.5
    with pytest.raises(UserError, match=r"pass@2 needs at least 2"):
        sandbox.pass_at_k(["assert x"], [[good]], 2)
