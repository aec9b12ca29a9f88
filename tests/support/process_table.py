"""The processes of this machine that have not ended."""

from pathlib import Path


def members(group: int) -> set[int]:
    """Return the processes of a process group."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_process, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(of_process) == group and state != "Z":
            found.add(int(stat.parent.name))
    return found
