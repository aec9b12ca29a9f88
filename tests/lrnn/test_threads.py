"""Test how many cores a process counts as its own."""

import os

import pytest

from lrnn import cli, threads


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "350000 100000"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),  # the limit of a parent
        ("0::/../../outside\n", {"cpu.max": "200000 100000"}, 2),
        ("5:cpu,cpuacct:/x\n1:memory:/\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000",
                                           "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 3),
        ("5:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 8),
        ("5:cpu,cpuacct:/outside\n", {"cpu,cpuacct/cpu.cfs_quota_us": "100000",
                                      "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
    ],
)  # fmt: skip
def test_usable_cores(tmp_path, monkeypatch, groups, files, cores):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(f"{text}\n")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert threads.usable_cores() == cores


def test_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "none")
    assert threads.usable_cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("given", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_do_not_spin(monkeypatch, given, policy):
    """The command line says so before it loads the module of a command, and with it torch."""
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: seen.append(os.environ["OMP_WAIT_POLICY"]))
    with pytest.raises(AttributeError):
        cli.main(["plot", "x"])
    assert seen == [policy]
