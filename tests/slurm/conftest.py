"""A SLURM cluster on this machine, stubs of its commands, and the corpus that the jobs of the tests train on."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, install

from lrnn.cli import main

ROOT = Path(__file__).parents[2]
STUB = """\
#!/bin/sh
# Counts jobs from 4711 and puts those of an array into the queue, task by task.
for script; do :; done
case $script in
    *"$REFUSE"*) [ -z "$REFUSE" ] || { echo "sbatch: error: invalid partition" >&2; exit 1; } ;;
esac
echo "$*" >> calls
number=$((4710 + $(grep -c "" calls)))
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
comment=$(sed -n "s/^#SBATCH --comment='\\(.*\\)'$/\\1/p" "$script")
if [ -n "$last" ]; then
    for task in $(seq 0 "$last"); do echo "${number}_$task|PENDING|Resources|$comment" >> queue; done
fi
echo "$number;cluster"
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """Return a SLURM cluster of two nodes. Skip tests that need it if it cannot be installed."""
    reason = install()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def enter_cluster(tmp_path, monkeypatch) -> Callable[[Cluster, str], None]:
    """Return a function that changes to `tmp_path` and takes the commands of a cluster, and a script for `lrnn`."""

    def enter(cluster: Cluster, script: str) -> None:
        program = tmp_path / "bin" / "lrnn"
        program.parent.mkdir()
        program.write_text(script)
        program.chmod(0o755)
        variables = {**cluster.env, "PATH": f"{program.parent}:{cluster.env['PATH']}", "PYTHONPATH": str(ROOT)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)

    return enter


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of a part of the standard library's source."""
    folder = tmp_path_factory.mktemp("slurm") / "corpus"
    source = [sysconfig.get_paths()["stdlib"], "--include", "json/*.py", "--processes", "1"]
    assert main(["corpus", *source, "--train-tokenizer", "400", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """Change to `tmp_path`, where stubs of SLURM's commands have their files: queue, calls, cancelled."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {
        "squeue": "#!/bin/sh\ncat queue\n",
        "sbatch": STUB,
        "scancel": '#!/bin/sh\necho "$@" >> cancelled\n',
    }.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("queue").touch()
    return tmp_path
