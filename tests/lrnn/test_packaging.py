"""Test what an installed lrnn holds and that it works in an empty folder: the sdist, its wheel, `pip install`."""

import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from installation import REPOSITORY, run

import lrnn

# What the commands need beside their modules.
DATA = {
    "py.typed", "configs/tiny.yaml", "configs/340m.yaml", "configs/models/1.3b.json", "configs/track/s5.yaml",
    "configs/ladder/ranges.yaml", "slurm/ladder.sbatch", "slurm/report.sbatch",
    "slurm/train.sbatch", "slurm/corpus.sbatch", "slurm/eval.sbatch", "eval/suites/tasks/_gold_bpb.yaml",
    "eval/suites/tasks/state_tracking/lrnn_s5_mc.yaml", "docs/index.md", "docs/results/index.md",
}  # fmt: skip


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"lrnn", f"lrnn-{lrnn.__version__}.dist-info"}
    inside = {name.removeprefix("lrnn/") for name in names}
    assert inside >= DATA
    package = Path(lrnn.__file__).parent
    wanted = set()
    for folder, _, files in os.walk(package, followlinks=True):
        paths = (Path(folder, file).relative_to(package) for file in files)
        wanted |= {str(path) for path in paths if path.suffix in (".py", ".yaml", ".json", ".sbatch", ".typed")}
    assert not wanted - inside


def test_the_sdist_holds_what_the_readme_names(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert links and set(links) - {"docker/"} <= names and "docker/Dockerfile" in names and "constraints.txt" in names


def test_links_work_outside_the_repository(installed):
    """Pages of the installed package link to each other; the description on a package index has no links to files."""
    pages = list((installed / "lrnn" / "docs").rglob("*.md"))
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())]
    assert len(links) > 10
    assert not [(page, link) for page, link in links if not (page.parent / link).exists()]
    (metadata,) = installed.glob("*.dist-info/METADATA")
    description = metadata.read_text(encoding="utf-8").partition("\n\n")[2]
    assert description.startswith("# lrnn") and not re.findall(r"\]\((?!https?:)[^)]*\)", description)


def test_version_and_help_of_the_installed_command(installed, tmp_path):
    command = [sys.executable, "-X", "importtime", installed / "bin" / "lrnn"]
    done = run(*command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert (done.returncode, done.stdout) == (0, f"lrnn {lrnn.__version__}\n")
    assert not re.search(r"\| +(torch|transformers|pydantic|numpy|yaml)$", done.stderr, re.MULTILINE)
    done = run(*command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert str(installed / "lrnn" / "docs") in "".join(done.stdout.split())


# Runs commands in one process, because each start would import torch and transformers again.
COMMANDS = """
import json, os, sys
from lrnn import cli
for arguments in json.loads(sys.argv[1]):
    print("$", arguments, flush=True)
    if arguments[0] == "cd":
        os.chdir(arguments[1])
    else:
        assert cli.main(arguments) == 0, arguments
"""


def test_commands_work_in_an_empty_folder(installed, tmp_path):
    data = "data={seq_len: 64, stream: {path: json, data_files: nowhere.jsonl, tokenizer: nowhere.model}}"
    small = ["train.steps=2", "train.batch_size=4", "seeds=[0]", "ranges=[negative]", "test.samples=4"]
    commands = [
        ["submit", "1.3b", "--dry-run", "--nodes", "2"],
        ["track", "parity_small", "--device", "cpu", *small],
        ["init", "project", "--config", "340m"],
        ["cd", "project"],
        ["submit", "run.yaml", "--dry-run", data, "--template", "slurm/train.sbatch"],
    ]
    done = run(sys.executable, "-c", COMMANDS, json.dumps(commands), cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"${in_container[@]}" lrnn pretrain' in done.stdout and "set -- 1.3b" in done.stdout
    assert (tmp_path / "runs/track/parity_small/table.md").is_file()
    assert sorted(p.name for p in (tmp_path / "project").iterdir()) == ["README.md", "model.json", "run.yaml", "slurm"]


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="takes minutes: set LRNN_TORTURE=1")
def test_the_whole_job_in_an_empty_folder(installed, tmp_path):
    command = [sys.executable, installed / "bin" / "lrnn"]
    done = run(*command, "quickstart", "--steps", "20", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "The model continues" in done.stdout and "Next:" in done.stdout
    done = run(*command, "pretrain", "tiny", "steps=2", "schedule.warmup_steps=1", cwd=tmp_path,
               PYTHONPATH=str(installed))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/tiny/metrics.jsonl").is_file()
