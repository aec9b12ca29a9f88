"""Test the processes of a run: their start, exit statuses, signals, and the environment that SLURM gives them."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import without_models

from lrnn.cli import main, parse
from lrnn.errors import UserError
from lrnn.pretrain import command as command_module
from lrnn.pretrain import distributed
from lrnn.pretrain import launch as launch_module
from lrnn.pretrain import train as train_module
from lrnn.pretrain.distributed import slurm_environment
from lrnn.pretrain.launch import (
    STOPPED,
    StopRequest,
    check_alone,
    check_worker,
    check_world,
    choose_threads,
    describe_idle_gpus,
    is_worker,
    launch,
    threads_per_process,
)

# A worker notes its environment and each signal it gets in a folder, and ends as the code that follows says.
WORKER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
def note(number, frame):
    with open(folder / f"signals-{rank}", "a") as f:
        f.write(signal.Signals(number).name + "\\n")
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(s, note)
(folder / f"ready-{rank}").write_text(" ".join(os.environ[k] for k in
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")))
def noted(n):
    file = folder / f"signals-{rank}"
    return file.exists() and len(file.read_text().split()) >= n
def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
"""


@pytest.fixture
def command(tmp_path):
    """`command(code)` returns a worker that reports that it is ready and then runs `code`."""
    return lambda code: [sys.executable, "-c", WORKER + textwrap.dedent(code), str(tmp_path)]


def signals(folder: Path, rank: int) -> list[str]:
    file = folder / f"signals-{rank}"
    return file.read_text().split() if file.exists() else []


def test_a_free_port_is_below_those_that_the_system_gives_away(monkeypatch):
    ports = {launch_module.free_port() for _ in range(8)}
    assert len(ports) > 1 and max(ports) < 32_768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(launch_module, "PORTS", range(port, port + 2))
        assert {launch_module.free_port() for _ in range(8)} == {port + 1}
        monkeypatch.setattr(launch_module, "PORTS", range(port, port + 1))
        with pytest.raises(UserError, match=rf"no free port of 127.0.0.1 among 100 from {port} to {port}"):
            launch_module.free_port()


def test_environment_of_the_workers(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch_module, "usable_cores", lambda: 7)
    assert launch(3, command("")) == 0
    seen = [(tmp_path / f"ready-{rank}").read_text().split() for rank in range(3)]
    assert [s[:4] for s in seen] == [[str(r), str(r), "3", "127.0.0.1"] for r in range(3)]
    assert len({s[4] for s in seen}) == 1 and int(seen[0][4]) > 1023
    assert {s[5] for s in seen} == {"2"}  # cores are divided among them
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch(1, command("")) == 0
    assert (tmp_path / "ready-0").read_text().split()[5] == "5"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", 0),
        (f"sys.exit({STOPPED})", STOPPED),
        (f"sys.exit({STOPPED} if rank else 0)", STOPPED),
        ("sys.exit(2)", 2),
        (f"sys.exit(3 if rank else {STOPPED})", 3),  # a failure is not a stop that can be resumed
    ],
)
def test_exit_status(command, code, status):
    assert launch(2, command(code)) == status


def test_a_failed_worker_ends_the_others(command):
    start = time.monotonic()
    code = launch(
        3, command("sys.exit(9) if rank == 1 else signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)")
    )
    assert code == 9 and time.monotonic() - start < 8


def test_others_that_ignore_the_signal_are_killed(command, monkeypatch):
    monkeypatch.setattr(launch_module._stop, "__defaults__", (1.0,))  # seconds of grace
    start = time.monotonic()
    assert (
        launch(2, command("wait_until(lambda: (folder / 'ready-0').exists()); sys.exit(4) if rank else time.sleep(60)"))
        == 4
    )
    assert time.monotonic() - start < 10


def test_a_killed_worker_is_a_failure_and_named(command, monkeypatch, capfd):
    monkeypatch.setattr(launch_module._stop, "__defaults__", (1.0,))
    code = launch(2, command("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)"))
    assert code not in (0, STOPPED)
    assert capfd.readouterr().err == "lrnn: process 1 was killed by SIGKILL\n"  # but not those stopped for it


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("sys.exit(3) if rank else (signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(60))", "status 3"),
        ("sys.exit(2)", None),  # the process itself has named the bad input
        (f"sys.exit({STOPPED})", None),
    ],
)
def test_the_failed_process_is_named(command, capfd, code, line):
    launch(2, command(code))
    assert capfd.readouterr().err == (f"lrnn: process 1 ended with {line}\n" if line else "")


def test_a_stopped_worker_is_not_left_over(command, tmp_path, monkeypatch):
    """A process that got SIGSTOP reacts to no signal but SIGKILL."""
    monkeypatch.setattr(launch_module._stop, "__defaults__", (1.0,))
    code = """
    (folder / f"id-{rank}").write_text(str(os.getpid()))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_until(lambda: (folder / "id-0").exists()); time.sleep(0.2); sys.exit(5)
    """
    assert launch(2, command(code)) == 5
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id-0").read_text()), 0)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_signals_are_passed_on_once(command, tmp_path, name):
    """The launcher, here this process, gets a signal. Each worker gets it once, and the job's status is theirs."""
    code = f"""
    if rank == 0:
        wait_until(lambda: (folder / "ready-1").exists())
        os.kill(os.getppid(), signal.{name})
    wait_until(lambda: noted(1)); time.sleep(0.5); sys.exit({STOPPED})
    """
    assert launch(2, command(code)) == STOPPED
    assert [signals(tmp_path, rank) for rank in range(2)] == [[name], [name]]


def test_ctrl_c_reaches_a_worker_once(command, tmp_path):
    """A terminal sends it to every process of the launcher's group, and the launcher passes it on."""
    assert launch(2, command('(folder / f"group-{rank}").write_text(str(os.getpgrp()))')) == 0
    groups = {int((tmp_path / f"group-{rank}").read_text()) for rank in range(2)}
    assert len(groups) == 2 and os.getpgrp() not in groups


def test_the_first_to_stop_does_not_end_the_others(command, tmp_path):
    """Ranks write their part of a checkpoint at their own pace."""
    code = f"""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1.5 * rank)
    (folder / f"done-{{rank}}").touch()
    sys.exit({STOPPED})
    """
    assert launch(2, command(code)) == STOPPED
    assert (tmp_path / "done-1").exists()


def test_no_worker_outlives_a_launcher_that_fails(command, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            if started:
                raise OSError("no more processes")
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(launch_module.subprocess, "Popen", Popen)
    code = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(60)"
    with pytest.raises(OSError, match="no more processes"):
        launch(2, command(code))
    assert started[0].poll() is not None


@pytest.mark.parametrize("late", [False, True])
def test_workers_end_with_a_launcher_that_is_killed(command, tmp_path, late):
    """This holds even if the launcher died before they could ask the kernel for the signal."""
    worker = """
        (folder / f"process-{rank}").write_text(str(os.getpid()))
        wait_until((folder / "go").exists)
        from without_models import leave_models_out
        leave_models_out()
        from lrnn.pretrain.launch import end_with_launcher
        end_with_launcher()
        (folder / f"asked-{rank}").touch()
        wait_until(lambda: noted(1), 60)
    """
    code = """if True:
        import json, sys
        from without_models import leave_models_out
        leave_models_out()
        from lrnn.pretrain.launch import launch
        launch(2, json.loads(sys.argv[1]))
    """
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(command(worker))], env=without_models.ENVIRONMENT
    )

    def wait_for(name: str, condition: Callable[[Path], bool] = Path.exists) -> None:
        deadline = time.monotonic() + 60
        while not all(condition(tmp_path / f"{name}-{rank}") for rank in range(2)):
            assert time.monotonic() < deadline, name
            time.sleep(0.05)

    wait_for("process")
    if not late:
        (tmp_path / "go").touch()
        wait_for("asked")
    launcher.kill()
    launcher.wait()
    (tmp_path / "go").touch()
    wait_for("signals", lambda file: file.exists() and file.read_text() != "")  # it is empty for a moment
    # The kernel may send it twice, once for each of the launcher's threads that ends.
    assert set(signals(tmp_path, 0)) == set(signals(tmp_path, 1)) == {"SIGTERM"}


def test_handlers_are_restored(command):
    before = [signal.getsignal(s) for s in launch_module.STOP_SIGNALS]
    launch(1, command(""))
    assert [signal.getsignal(s) for s in launch_module.STOP_SIGNALS] == before
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):  # a second time, by Ctrl-C
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in launch_module.STOP_SIGNALS] == before


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Put an `scontrol` that expands one list of hosts on PATH."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "scontrol"
    stub.write_text(
        "#!/usr/bin/env bash\n"
        '[ "$*" = "show hostnames gpu[07-09]" ] || { echo "unexpected: $*" >&2; exit 1; }\n'
        "printf 'gpu07\\ngpu08\\ngpu09\\n'\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_slurm_environment(scontrol):
    env = {
        "SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_STEP_NUM_TASKS": "24", "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    found = slurm_environment(env)
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "24", "MASTER_ADDR": "gpu07"}
    # Two jobs on one host must not meet at a port, but all tasks of a job must.
    assert 1024 < int(port) < 65536 and port == slurm_environment({**env, "SLURM_PROCID": "2"})["MASTER_PORT"]
    assert port != slurm_environment({**env, "SLURM_JOB_ID": "1234568"})["MASTER_PORT"]


def test_in_a_container_the_batch_script_names_the_first_host(monkeypatch, tmp_path):
    """SLURM's commands are not in the image."""
    env = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"), "1")
    env |= {"SLURM_STEP_NODELIST": "gpu[07-09]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_environment({**env, "MASTER_ADDR": "gpu07"})["MASTER_ADDR"] == "gpu07"
    with pytest.raises(UserError, match="scontrol is not found, as in a container: set MASTER_ADDR to the job's first"):
        slurm_environment(env)


def test_which_processes_are_workers(monkeypatch):
    for name in ("RANK", "SLURM_STEP_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not is_worker()
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # inside a job, but not started by srun
    assert not is_worker()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a shell of `srun --pty`, which may start processes
    assert not is_worker()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert is_worker()
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.setenv("RANK", "0")  # torchrun
    assert is_worker()


@pytest.fixture
def started(monkeypatch):
    """`started(**variables)` replaces the variables that launchers set."""

    def set_environment(**variables: object) -> None:
        for name in [*os.environ]:
            if name.startswith(("SLURM_", "OMPI_", "LOCAL_")) or name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_environment


SRUN = {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 1, "SLURM_LOCALID": 1}
TORCHRUN = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}


@pytest.mark.parametrize(
    ("variables", "nproc", "local_rank", "message"),
    [
        (SRUN, None, None, None),
        (SRUN, 4, None, None),
        (SRUN, 2, None, "--nproc 2 cannot be obeyed: srun started this process as one of 4; leave --nproc out"),
        (TORCHRUN, 4, 1, None),
        (
            TORCHRUN,
            1,
            None,
            r"--nproc 1 cannot be obeyed: a launcher such as torchrun \(RANK is set\) started .* of 4;",
        ),
        (TORCHRUN, None, 0, "--local_rank 0 contradicts the environment, in which the local rank is 1"),
    ],
)
def test_options_of_a_process_that_others_started(started, variables, nproc, local_rank, message):
    started(**variables)
    assert is_worker()
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_worker(nproc, local_rank)


def test_options_of_a_process_that_is_alone(started):
    started(SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=1)
    check_alone(None)
    check_alone(0)
    with pytest.raises(UserError, match="--local_rank 1 is given, but RANK and WORLD_SIZE are not in the environment"):
        check_alone(1)
    started(OMPI_COMM_WORLD_SIZE=2)
    with pytest.raises(UserError, match="mpirun started this process as one of 2, which is not supported"):
        check_alone(None)


@pytest.mark.parametrize(("rank", "printed"), [(0, 1), (1, 0)])
def test_one_process_says_that_nproc_is_refused(started, capsys, monkeypatch, rank, printed):
    started(**SRUN | {"SLURM_PROCID": rank})
    monkeypatch.setattr(command_module, "load_config", lambda path, overrides: None)
    assert main(["pretrain", "x.yaml", "--nproc", "2"]) == 2
    assert capsys.readouterr().err.count("lrnn: error: --nproc 2 cannot be obeyed") == printed


def test_the_only_task_of_srun_starts_processes(started, monkeypatch):
    started(SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_JOB_ID=7)
    monkeypatch.setattr(command_module, "load_config", lambda path, overrides: SimpleNamespace(run_dir="none"))
    monkeypatch.setattr(command_module, "load_model_of", lambda config: None)
    monkeypatch.setattr(command_module, "stages_left", lambda config, samples: [])
    monkeypatch.setattr(command_module, "launch", lambda processes, command: 40 + processes)
    assert main(["pretrain", "x.yaml", "--nproc", "2"]) == 42
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert main(["pretrain", "x.yaml"]) == 48


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_the_option_of_deepspeeds_launcher(option):
    """`deepspeed --module lrnn.cli pretrain run.yaml` puts it before the command, torch.distributed.launch as well."""
    for argv in ([option, "pretrain", "run.yaml", "a=1"], ["pretrain", "run.yaml", option, "a=1"]):
        args, _ = parse(argv)
        assert (args.command, args.config, args.local_rank, args.overrides) == ("pretrain", "run.yaml", 1, ["a=1"])


@pytest.mark.parametrize(
    ("tasks", "gpus", "line"),
    [
        ("1(x2)", 8, "srun started 1 tasks per node, which use 1 of its 8 GPUs; --ntasks-per-node 8 uses all"),
        ("8(x2),4", 8, None),
        ("4", 1, None),  # a task that sees its own GPU only
        ("2", 0, None),
    ],
)
def test_gpus_that_no_task_uses_are_named(started, monkeypatch, tasks, gpus, line):
    started(SLURM_STEP_TASKS_PER_NODE=tasks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert describe_idle_gpus() == line


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 12),
        ({"RANK": 0, "LOCAL_WORLD_SIZE": 4}, 3),  # torchrun
        ({"RANK": 0, "LOCAL_SIZE": 5}, 2),  # deepspeed
        ({"RANK": 0, "LOCAL_WORLD_SIZE": 40}, 1),
        (SRUN, 1),
        (SRUN | {"SLURM_CPUS_PER_TASK": 6}, 6),
        ({"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 1, "SLURM_CPUS_PER_TASK": 6}, 12),
    ],
)
def test_threads_of_a_process(started, monkeypatch, variables, threads):
    started(**variables)
    monkeypatch.setattr(launch_module, "usable_cores", lambda: 12)
    assert threads_per_process() == threads
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    choose_threads()
    assert chosen == [threads]


def test_number_of_processes(monkeypatch):
    check_world(3)
    with pytest.raises(UserError, match="--nproc 0 should be at least 1"):
        check_world(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_world(2)
    with pytest.raises(UserError, match="--nproc 3 is more than the 2 visible GPUs"):
        check_world(3)


def test_signals_are_handled_before_the_engine_starts(monkeypatch):
    """Loading and compiling a large model takes minutes; a signal then must not look like a failure."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(command_module, "load_config", lambda path, overrides: None)
    monkeypatch.setattr(command_module, "choose_threads", lambda: None)
    monkeypatch.setattr(distributed, "init_ranks", lambda start_up: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)

    def train(config, ranks, stop, allow_change, start_up, make):
        os.kill(os.getpid(), signal.SIGUSR1)
        return STOPPED if stop.signal == "SIGUSR1" else 1

    monkeypatch.setattr(train_module, "train", train)
    # If our handler is missing, the signal would end this process; ignored, it makes the test fail instead.
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        assert (
            command_module.main(
                argparse.Namespace(config="x", overrides=[], nproc=None, local_rank=None, allow_change=False)
            )
            == STOPPED
        )
    finally:
        signal.signal(signal.SIGUSR1, previous)
