"""Test runs on several hosts without SLURM, on two that are made of namespaces of this machine.

LRNN_TORTURE=1 starts them with torchrun and DeepSpeed's launcher (`make torture`).
"""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import host_worker
import pytest
from fork_server import CONTEXT
from training_group import losses, run_group
from two_hosts import DEBIAN, NotPossible, two_hosts

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import parse_config
from lrnn.pretrain.hosts import check_same
from lrnn.pretrain.launch import STOPPED
from lrnn.records import read_metrics

ROOT = Path(__file__).parents[2]
PORT = "29500"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Return two hosts whose own names are loopback addresses in /etc/hosts."""
    try:
        with two_hosts(tmp_path_factory.mktemp("hosts"), DEBIAN) as made:
            yield made
    except NotPossible as reason:
        pytest.skip(str(reason))


def run_on(hosts, target, output: Path, given: list, **variables: str) -> list[int | None]:
    """Run a function of host_worker.py as one process per host. Return their exit statuses."""
    workers = []
    for rank, host in enumerate(hosts):
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": PORT, **variables}
        workers.append(CONTEXT.Process(target=target, args=(host, environment, output, given)))
        workers[-1].start()
    for worker in workers:
        worker.join(60)
        worker.kill()
    print(output.read_text() if output.exists() else "no output")
    return [worker.exitcode for worker in workers]


def test_two_hosts_train_as_one(hosts, base, tmp_path):
    """Different settings, and a folder that is not shared, are refused. Then losses are bitwise those of one host."""
    settings = {"steps": 3, "checkpoint": {"every": 2}}
    one, two = base("one", 1, **settings), base("two", 1, **settings)
    changed = {"optim": two["optim"] | {"lr": 0.02}}
    Path(two["run_dir"]).mkdir()
    specs = [{"config": two, "changed": changed}, {"config": two, "hidden": True}, {"config": two}]
    assert run_on(hosts, host_worker.trainings, tmp_path / "output", specs) == [0, 0]
    output = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines() if line.startswith('["st')]
    statuses = [[status for _, rank, status in output if rank == r] for r in range(2)]
    assert statuses[0] == statuses[1]
    other, hidden, done = statuses[0]
    assert other.startswith("rank 1 on beta has another value of optim.lr than rank 0 on alpha: 0.02 instead of 0.01;")
    assert f"run_dir {two['run_dir']} is not one folder for all: rank 1 on beta does not see what rank 0 on" in hidden
    assert done == 0 and not list(Path(two["run_dir"]).glob(".shared-*"))
    assert run_group(tmp_path, [{"config": one}]) == [0]
    assert losses(two) == losses(one) and len(losses(one)) == 3


def test_a_host_that_others_do_not_reach_is_named(hosts, base, tmp_path):
    """alpha is given by a name that is a loopback address there, so that it cannot know its network."""
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(base()))
    given = ["pretrain", str(config)]
    assert run_on(hosts, host_worker.command, tmp_path / "output", given, MASTER_ADDR="alpha") == [2, 2]
    (line,) = [line for line in (tmp_path / "output").read_text().splitlines() if line.startswith("lrnn: error:")]
    assert "other hosts do not reach alpha, whose name has the address 127.0.1.1 there: give its address" in line
    assert not Path(base()["run_dir"]).exists()


# `ssh HOST COMMAND` and `pdsh -S -f N -w HOSTS COMMAND` as DeepSpeed's launcher calls them.
SSH = """
hosts = json.loads(open(folder + "/enter.json").read())
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:]
sys.exit(subprocess.run([*hosts[words[0]], "sh", "-c", " ".join(words[1:])]).returncode)
"""
PDSH = """
names, words = sys.argv[5].split(","), " ".join(sys.argv[6:])
assert sys.argv[1:3] == ["-S", "-f"] and sys.argv[4] == "-w", sys.argv
started = [subprocess.Popen(["ssh", name, words.replace("%n", str(n))]) for n, name in enumerate(names)]
sys.exit(max(process.wait() for process in started))
"""
TORCHRUN = (
    "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint alpha:29400 --rdzv-id run "
    "--local-addr ADDRESS -m lrnn.cli"
)
HOSTFILE = "deepspeed --hostfile HOSTFILE --module lrnn.cli"
NO_SSH = "deepspeed --hostfile HOSTFILE --no_ssh --node_rank RANK --master_addr 10.77.0.1 --module lrnn.cli"


def start(launcher: str, hosts, folder: Path, arguments: list[str]) -> list[subprocess.Popen]:
    """Start a launcher with the command line `lrnn ARGUMENTS`: on every host, or once outside of them if it has ssh."""
    (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    (folder / "enter.json").write_text(json.dumps({host.name: host.command() for host in hosts}))
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\nimport json, subprocess, sys\nfolder = {str(folder)!r}\n{text}")
        program.chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    commands = []
    for rank, host in enumerate(hosts):
        given = {"ADDRESS": host.address, "HOSTFILE": str(folder / "hostfile"), "RANK": str(rank)}
        words = [*(given.get(word, word) for word in launcher.split()), *arguments]
        commands.append(words if launcher == HOSTFILE else host.command(*words))
    if launcher == HOSTFILE:
        del commands[1:]
    return [subprocess.Popen(command, env=env, cwd=ROOT) for command in commands]


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="long: LRNN_TORTURE=1 (make torture)")
@pytest.mark.parametrize(
    ("launcher", "status"),
    [(TORCHRUN, 1), (HOSTFILE, STOPPED), (NO_SSH, STOPPED)],
    ids=["torchrun", "deepspeed with a hostfile", "deepspeed without ssh"],
)
def test_launchers(hosts, base, tmp_path, launcher, status):
    """A run that is stopped by a signal to its main process, and resumed, has bitwise the losses of one on one host."""
    one, two = base("one", 1, steps=40), base("two", 1, steps=40)
    config, run = tmp_path / "run.yaml", Path(two["run_dir"])
    config.write_text(json.dumps(two))
    processes = start(launcher, hosts, tmp_path, ["pretrain", str(config)])
    while not any("loss" in record for record in (read_metrics(run) if (run / "metrics.jsonl").exists() else [])):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    holder = json.loads((run / ".running.json").read_text())
    host = next(host for host in hosts if host.name == holder["host"])
    subprocess.run(host.command("kill", "-USR1", str(holder["pid"])), check=True)
    assert [process.wait(300) for process in processes] == [status] * len(processes)
    processes = start(launcher, hosts, tmp_path, ["pretrain", str(config)])
    assert [process.wait(300) for process in processes] == [0] * len(processes)
    assert [r["resumed"] for r in read_metrics(run) if r.get("event") == "start"] == [False, True]
    assert run_group(tmp_path, [{"config": one}]) == [0]
    assert losses(two) == losses(one) and len(losses(one)) == 40


def test_settings_of_stages_are_compared(base):
    """Ranks with another learning rate in a stage would train with it."""
    seen = []

    def gather(value):
        seen.append(value)
        return [seen[0], value]

    ranks, data = SimpleNamespace(world_size=2, gather=gather), SimpleNamespace(description={}, stages=[])
    for lr in (0.01, 0.02):
        config = parse_config(base(stages=[{"steps": 2}, {"steps": 4, "lr": lr}]), "test")
        with pytest.raises(UserError, match=r"stages\.1\.lr") if lr == 0.02 else nullcontext():
            check_same(config, LrnnConfig(), data, ranks)
