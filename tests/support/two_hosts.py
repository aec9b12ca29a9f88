"""Two hosts on this machine: Linux namespaces with a name, an address and processes of their own, joined by a cable.

They share all files but /etc/hosts, as the hosts of a cluster do, and they reach no other network.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lrnn.pretrain.launch import PR_SET_PDEATHSIG

ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
EVERYBODY = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
# As Debian and Ubuntu write it: the name of the host itself is a loopback address.
DEBIAN = {name: EVERYBODY.replace(address, "127.0.1.1") for name, address in ADDRESSES.items()}
START_S = 10
NAMESPACES = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
FIRST = ["sleep", "infinity"]  # the first process of a host; all others of the host end with it


class NotPossible(RuntimeError):
    """This machine lacks a program, or does not allow namespaces."""


@dataclass
class Host:
    """One of the two hosts."""

    name: str
    address: str
    process: int  # its first process, as numbered outside

    def command(self, *command: str) -> list[str]:
        """Return what runs a command on this host, in the present folder."""
        # /proc is that of outside, which the processes of `enter` need.
        return self._inside("unshare", "--mount-proc", *command)

    def set_up(self, commands: str) -> None:
        """Run commands of a shell that change this host."""
        _run(self._inside("sh", "-c", commands))

    def _inside(self, *command: str) -> list[str]:
        spaces = ["--user", "--net", "--uts", "--mount", "--pid", "--preserve-credentials"]
        return ["nsenter", f"--target={self.process}", *spaces, f"--wd={Path.cwd()}", *command]

    def enter(self) -> None:
        """Move this process, which must have one thread, to this host. Its number stays, as do its open files."""
        folder, libc = Path.cwd(), ctypes.CDLL(None, use_errno=True)
        files = [os.open(f"/proc/{self.process}/ns/{name}", os.O_RDONLY) for name in ("user", "net", "uts", "mnt")]
        for file in files:
            if libc.setns(file, 0) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.name}")
            os.close(file)
        os.chdir(folder)


@contextmanager
def two_hosts(folder: Path, names: dict[str, str] | None = None) -> Iterator[list[Host]]:
    """Make two hosts for the `with` block. None of their processes is left after it.

    Args:
        folder: for their files.
        names: text of /etc/hosts, by host; by default both know both addresses.

    Raises:
        NotPossible: this machine lacks a program, or does not allow namespaces. The message says which or why.
        RuntimeError: making them failed in another way.
    """
    started: list[subprocess.Popen] = []
    try:
        first = _start(["unshare", "--user", "--map-root-user", *NAMESPACES, *FIRST], started)
        inside = ["nsenter", f"--target={first}", "--user", "--net", "--preserve-credentials"]
        second = _start([*inside, "unshare", *NAMESPACES, *FIRST], started)
        _run([*inside, "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(second)])
        hosts = [Host(name, ADDRESSES[name], process) for name, process in zip(ADDRESSES, (first, second), strict=True)]
        for host in hosts:
            file = folder / f"hosts-{host.name}"
            file.write_text((names or {}).get(host.name, EVERYBODY))
            host.set_up(
                f"hostname {host.name} && mount --bind '{file}' /etc/hosts && ip link set lo up && "
                f"ip address add {host.address}/24 dev cable && ip link set cable up"
            )
        yield hosts
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def _start(command: list[str], started: list[subprocess.Popen]) -> int:
    """Start namespaces, and return the number of their first process."""
    try:
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_end_with_parent))
    except FileNotFoundError as error:
        raise NotPossible(f"{error.filename} is not installed") from None
    number = started[-1].pid
    children, deadline = Path(f"/proc/{number}/task/{number}/children"), time.monotonic() + START_S
    while time.monotonic() < deadline:
        if started[-1].poll() is not None:
            raise _error("no namespaces", started[-1].communicate()[1])
        if found := children.read_text().split():
            first = int(found[0])
            if Path(f"/proc/{first}/cmdline").read_text().split("\0")[:-1] == FIRST:
                return first
        time.sleep(0.02)
    raise RuntimeError(f"no namespaces within {START_S} s")


def _end_with_parent() -> None:
    """Ask the kernel to kill this process when the tests are killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise _error("no network of namespaces", done.stderr)


def _error(what: str, printed: str) -> RuntimeError:
    """Return the error for a program that failed, from what it printed."""
    missing = "not permitted" in printed or "No such file or directory" in printed
    return (NotPossible if missing else RuntimeError)(f"{what}: {printed.strip()}")
