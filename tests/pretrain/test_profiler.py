"""Test the profile of a run: which steps are in it, and that it changes nothing."""

import gzip
import json
import re
from pathlib import Path

import pytest
from training_group import losses, run_group

from lrnn.cli import main
from lrnn.pretrain.launch import STOPPED


def profiled_steps(trace: Path) -> list[int]:
    """Return the steps that a trace holds; each of them has events of PyTorch inside."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {e["name"]: e for e in events if re.fullmatch(r"step \d+", e.get("name", ""))}
    operators = [e["ts"] for e in events if e.get("name") == "aten::mm"]
    for step in names.values():
        assert any(step["ts"] <= ts <= step["ts"] + step["dur"] for ts in operators)
    return sorted(int(name.split()[1]) for name in names)


def test_a_profile_holds_its_steps_alone_and_changes_nothing(base, tmp_path):
    """A run that is stopped within the steps writes those so far, and one that resumes after them writes none."""
    plain, whole = base("plain", 1, steps=4), base("whole", 1, steps=4, profile={"steps": [2, 3]})
    stopped = base("stopped", 1, profile={"steps": [2, 6]})
    blocked = base("blocked", 1, steps=2, profile={"steps": [2, 2]})
    Path(blocked["run_dir"]).mkdir()
    (Path(blocked["run_dir"]) / "profile").write_text("a file where the folder should be")
    specs = [{"config": plain}, {"config": whole}, {"config": {**whole, "steps": 5}, "allow_change": True}]
    specs += [{"config": stopped, "stop_at": 3}, {"config": blocked}]
    assert run_group(tmp_path, specs) == [0, 0, 0, STOPPED, 0]
    assert list(losses(whole).items())[:4] == list(losses(plain).items())
    for run, name, steps in ((whole, "steps-2-3", [2, 3]), (stopped, "steps-2-3", [2, 3])):
        found = sorted((Path(run["run_dir"]) / "profile").rglob("*.*"))
        assert [file.parent.name for file in found] == [name, name]
        assert [file.name for file in found] == ["rank0_trace.json.gz", "rank1_trace.json.gz"]
        assert [profiled_steps(file) for file in found] == [steps, steps]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("[5,3]", "profile.steps is [5, 3], but its first step comes after its last"),
        ("[99,101]", "profile.steps is [99, 101], but the run has 100 steps"),
        ("[0,3]", "key profile.steps.0 = 0: should be greater than or equal to 1"),
        ("[3]", "key profile.steps = [3]: "),
        ("3", "key profile.steps = 3: should be a valid list"),
        ("[1,2.5]", "key profile.steps.1 = 2.5: should be a valid integer"),
    ],
)
def test_impossible_steps_are_refused(steps, reason, capsys):
    """They are refused before anything is made."""
    assert main(["pretrain", "tiny", "run_dir=never", "steps=100", f"profile.steps={steps}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lrnn: error: ") and reason in error
    assert not Path("never").exists()
