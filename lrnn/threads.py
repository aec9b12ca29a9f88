"""How many cores this process may use, and how the threads of its computations wait.

torch starts one thread per core that the process may run on. It does not look at the CPU quota of a container, and its
threads spin while they wait for each other: on a machine that is busy with other work they take turns at spinning.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def wait_without_spinning() -> None:
    """Let the threads of OpenMP sleep while they wait. This counts if torch is not loaded yet, and for child processes.

    It changes no result. `OMP_WAIT_POLICY` in the environment has precedence.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def usable_cores() -> int:
    """Return the number of cores this process may use: those it may run on, and no more than its quota of CPU time."""
    cores = min([len(os.sched_getaffinity(0)), *_quotas()])
    return max(1, math.floor(cores))


def _quotas() -> Iterator[float]:
    """Yield the quota, in cores, of each control group that this process is in, if it has one."""
    groups = OWN_CGROUPS.read_text() if OWN_CGROUPS.exists() else ""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers
        # In a container, `path` may be the path outside of it, and the group's own files are then in `root`.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _quota(group)


def _quota(group: Path) -> Iterator[float]:
    try:
        if (group / "cpu.max").exists():  # version 2 of control groups
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    except FileNotFoundError:
        return
    if quota != "max" and int(quota) > 0:
        yield int(quota) / int(period)
