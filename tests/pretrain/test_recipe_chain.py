"""Test what recipes do one after the other: begin with weights, two stages, a stop at the boundary, other processes.

LRNN_TORTURE=1 pytest tests/pretrain/test_recipe_chain.py       takes a minute of CPU time
"""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_group import losses, run_group

from lrnn.cli import main
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.launch import STOPPED


@pytest.mark.skipif(os.environ.get("LRNN_TORTURE") != "1", reason="takes a minute of CPU time: LRNN_TORTURE=1")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_from_weights_through_two_stages_to_an_export(base, corpora, tmp_path, optimizer):
    """The run stops where a stage with longer samples and another mix begins, and resumes; then on one process."""
    source = base("source", steps=1, schedule={})  # the folder of a run is one to begin with
    long = {"steps": 2, "seq_len": 128, "corpora": [{"path": str(corpora / "b")}]}
    changes = {"stages": [{"steps": 2}, long], "init_from": source["run_dir"], "schedule": {"warmup_steps": 1}}
    changes |= {"optim": {"name": optimizer, "lr": 0.01, "z_loss": 1e-3, "decay_embeddings": False}}
    runs = [base(name, **changes) for name in ("straight", "stopped", "moved")]
    for config in runs:
        del config["steps"], config["model"]
    straight, stopped, moved = runs
    specs = [{"config": source}, {"config": straight}, {"config": stopped, "stop_at": 3}, {"config": stopped}]
    assert run_group(tmp_path, [*specs, {"config": moved, "stop_at": 3}]) == [0, 0, STOPPED, 0, STOPPED]
    assert run_group(tmp_path, [{"config": moved}], processes=1) == [0]
    truth = losses(straight)
    assert list(truth) == [1, 2, 3, 4] and truth == losses(stopped)
    assert [x[0] for x in losses(moved).values()] == pytest.approx([x[0] for x in truth.values()], rel=1e-5)

    assert main(["export", stopped["run_dir"], str(tmp_path / "hf")]) == 0
    state = SavedState(checkpoint.find_newest(Path(stopped["run_dir"])))
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert exported.keys() == state.parameters()
    for name, x in exported.items():
        assert x.flatten().equal(state.read("param", name, 0, x.numel()).to(x.dtype)), name
