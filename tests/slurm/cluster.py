"""A SLURM cluster of two nodes on this machine.

It needs Debian's packages and root. Everything that it writes is in one folder.

`python tests/slurm/cluster.py` starts one by hand and stops it on Ctrl-C. Tests take it as the fixture `slurm`.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
# These names resolve, all to this machine: a run's first process is looked up by the name of its node.
NODES = ("127.0.0.1", "127.0.0.2")
CPUS = 4  # per node; may be more than the machine has, because tasks are not bound to cores
KILL_WAIT_S = 20  # between SIGTERM and SIGKILL, as KillWait in slurm.conf
GRACE_TIME_S = 20  # between the SIGTERM that announces a pre-emption and the end of the job
TIMEOUT_S = 30

CONFIGURATION = """\
ClusterName=lrnn
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential holds, 2 minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# There are no cgroups to use in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# The port at which a run's processes meet follows from the job's number: two clusters of one machine must not share it.
FirstJobId={first_job}
KillWait={kill_wait}
SchedulerParameters=sched_interval=2
SlurmctldTimeout=300
SlurmdTimeout=300
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_time}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def install() -> str | None:
    """Install what is missing. Return the reason if that cannot be done, for a skipped test."""
    if os.geteuid() != 0:
        return "SLURM's daemons want root"
    if all(shutil.which(program) for program in PROGRAMS):
        return None
    if shutil.which("apt-get") is None:
        return "SLURM is not installed, and there is no apt-get to install it"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: start no service
    packages = ["slurm-wlm", "munge"]
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", "--quiet", *arguments], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        return f"apt-get install {' '.join(packages)} failed: {done.stderr.strip().splitlines()[-1:]}"
    return None


class Cluster:
    """A cluster that starts when it is created. `stop` ends its daemons and removes its folder.

    Attributes:
        env: environment in which SLURM's commands speak to this cluster.
    """

    def __init__(self) -> None:
        # The path is short because that of a socket has 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0], controller_port=ports[0], folder=folder, nodes=nodes,
                kill_wait=KILL_WAIT_S,
                grace_time=GRACE_TIME_S,
                first_job=random.randrange(1, 19_000),
            )
        )  # fmt: skip
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        # --force: the log may be in a folder of another user; the folder itself is ours alone.
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={folder / v}" for k, v in files.items()))
        _wait_until((folder / "munge.socket").exists, "munged makes no socket", folder / "munge.log")
        self._daemon("slurmctld", "-D", "-i")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        _wait_until(self._idle, "the nodes do not become idle", folder / "slurmctld.log")

    def _daemon(self, *command: str) -> None:
        # Daemons have a session of their own, so that Ctrl-C ends the tests first and then the daemons in order.
        log = (self.folder / f"{command[0]}.out").open("ab")
        self._daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def _idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "test", "-o", "%t"], env=self.env, capture_output=True, text=True
        )
        return done.stdout.split() == ["idle"] * len(NODES)

    def run(self, *command: str) -> str:
        """Run a SLURM command and return its output. Raise AssertionError with its errors if it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def stop(self) -> None:
        """Cancel all jobs, end the daemons, remove the folder."""
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], env=self.env, capture_output=True)
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True)
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline and self._jobs():
                time.sleep(0.2)
        for daemon in reversed(self._daemons):  # munged is last because the others sign with it
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        shutil.rmtree(self.folder)

    def _jobs(self) -> str:
        return subprocess.run(["squeue", "-h"], env=self.env, capture_output=True, text=True).stdout


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _wait_until(condition, failure: str, log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{failure}: {log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.1)


def main() -> None:
    reason = install()
    if reason is not None:
        raise SystemExit(reason)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = Cluster()
    try:
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
