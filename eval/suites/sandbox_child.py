"""The inner half of `sandbox.py`: build the sandbox, then become the program. Uses the standard library only.

It is run as `python -I -S sandbox_child.py CONFIG_JSON` with the program on standard input. There are three processes:
this one; an init (process 1 of a new process namespace), whose death makes the kernel kill everything that the program
started, even processes that left the process group; and the program itself, as nobody, without capabilities, in a root
that holds the Python installation read-only and an empty /tmp, and nothing else of the machine.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 442, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NOBODY = 65534
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def new_namespaces() -> None:
    """Unshare network (no interface is up), processes, mounts and IPC; without privileges, users too."""
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(flags if uid == 0 else flags | CLONE_NEWUSER), "unshare")
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(root: str, prefixes: list[str], size: int) -> None:
    """Mount a small tmpfs on `root`, with /tmp and read-only views of the system libraries and of Python."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    os.mkdir(root + "/tmp")  # first, because it would hide a Python that is installed below /tmp
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=1777")
    shown: list[str] = []
    for path in [*SYSTEM, *sorted(prefixes, key=len)]:
        target = root + path
        if not os.path.lexists(path) or any(path == other or path.startswith(other + "/") for other in shown):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path) and path in SYSTEM:
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        mount(path, target, None, MS_BIND | MS_REC)
        make_read_only(target, AT_RECURSIVE)
        shown.append(path)
    make_read_only(root, 0)


def make_read_only(target: str, flags: int) -> None:
    # mount_setattr is needed: a plain remount reaches neither mounts below nor mounts with locked flags.
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    arguments = (AT_FDCWD, target.encode(), flags, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)))
    check(libc.syscall(SYS_MOUNT_SETATTR, *arguments), f"mount_setattr {target}")


def become_program(config: dict, source: bytes) -> None:
    os.chroot(config["root"])
    os.chdir("/tmp")
    with open("program.py", "wb") as file:
        file.write(source)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    for name, value in config["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.write(config["status_fd"], b"R")
    # One thread each, because a BLAS that reserves memory for 64 threads would exceed the limit.
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    os.execve(config["python"], [config["python"], "-I", "program.py"], environment)


def wait_for(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def main() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # so that nothing outlives an evaluation that was killed
    config = json.loads(sys.argv[1])
    source = sys.stdin.buffer.read()
    new_namespaces()
    init = os.fork()
    if init:
        os._exit(wait_for(init))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(config["root"], config["prefixes"], config["tmpfs_bytes"])
    program = os.fork()
    if program == 0:
        become_program(config, source)
    os.close(config["status_fd"])
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program may run as the same user and must not trace its init
    os._exit(wait_for(program))


if __name__ == "__main__":
    main()
