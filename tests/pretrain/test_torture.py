"""Kill a run at random moments, each time followed by a resume. LRNN_TORTURE=1 makes it 300 kills (`make torture`)."""

import json
import os
from pathlib import Path

from fork_server import run_program

KILLS = 200 if os.environ.get("LRNN_TORTURE") == "1" else 6  # and half as many with checkpoints in the background
EVERY = 3  # steps from checkpoint to checkpoint
PROGRAM = Path(__file__).with_name("torture.py")


def test_every_kill_is_survived(base, hybrid_json, tmp_path):
    """After every kill, losses are bitwise those of an undisturbed run, and at most one interval is repeated."""
    changes = {"model": str(hybrid_json), "checkpoint": {"every": EVERY, "keep_last": 2}}
    config = base(steps=8 * EVERY, global_batch_size=4, log={"every": 1, "tensorboard": False}, **changes)
    config["data"] |= {"seq_len": 32}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"config": config, "folder": str(tmp_path), "kills": KILLS, "seed": 0}))
    status = run_program(PROGRAM, tmp_path / "output", spec)
    lines = (tmp_path / "output").read_text().splitlines()
    assert status == 0, "\n".join(lines[-100:])
    result = json.loads(lines[-1])
    print(f"\n{json.dumps(result, indent=1)}")
    for way, kills, most in (("waited for", KILLS, EVERY), ("in the background", KILLS // 2, 2 * EVERY)):
        assert result[way]["kills"] == kills
        assert result[way]["finished"] == result[way]["runs"] and result[way]["steps repeated at most"] <= most
