"""Test what recipes do in turn: import, begin, two stages, a stop at the boundary, other processes, export."""

import json
import shutil
from pathlib import Path

import clean_process
import pytest
from export_checkpoints import random_model
from safetensors.torch import load_file
from training_group import losses, run_group

from lrnn.cli import main
from lrnn.eval.export import check
from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.pretrain.launch import STOPPED
from lrnn.records import events_by_step, read_metrics

OPTIMIZERS = ("adamw", "muon")
WATCHED = {"eval": {"every": 2, "tasks": ["lrnn_parity_mc"], "limit": 4, "max_length": 2048}}


@pytest.fixture
def imported(corpora, tmp_path, monkeypatch):
    """Return a folder that `lrnn import` has written."""
    monkeypatch.setattr(check.subprocess, "run", clean_process.run)
    download = tmp_path / "download"
    random_model("gated").save_pretrained(download)
    shutil.copy(corpora / "a/tokenizer/tokenizer.model", download)
    assert main(["import", str(download), str(tmp_path / "imported")]) == 0
    return tmp_path / "imported"


@pytest.fixture
def runs(base, corpora, imported):
    """Return the configurations of three runs with each optimizer: straight, stopped and watched, moved."""
    long = {"steps": 2, "seq_len": 128, "corpora": [{"path": str(corpora / "b")}]}  # longer samples, another mix
    changes = {"stages": [{"steps": 2}, long], "init_from": str(imported), "schedule": {"warmup_steps": 1}}
    configs = {}
    for name in OPTIMIZERS:
        optim = {"name": name, "lr": 0.01, "z_loss": 1e-3, "decay_embeddings": False}
        for run, more in {"straight": {}, "stopped": WATCHED, "moved": {}}.items():
            config = base(f"{name}-{run}", 1, **changes, **more, optim=optim)  # ZeRO-1, as the configurations have it
            configs[name, run] = {key: value for key, value in config.items() if key not in ("steps", "model")}
    return configs


def test_from_a_download_through_two_stages_to_an_export(runs, tmp_path):
    """Losses are those of a run that never stopped: bitwise on as many processes, with evaluations and without."""
    specs, expected = [], []
    for name in OPTIMIZERS:
        straight, stopped, moved = (runs[name, run] for run in ("straight", "stopped", "moved"))
        specs += [{"config": straight}, {"config": stopped, "stop_at": 2}, {"config": stopped}]
        specs += [{"config": moved, "stop_at": 2}]
        expected += [0, STOPPED, 0, STOPPED]
    assert run_group(tmp_path, specs) == expected
    alone = [{"config": runs[name, "moved"]} for name in OPTIMIZERS]
    assert run_group(tmp_path, alone, processes=1) == [0, 0]

    for name in OPTIMIZERS:
        truth = losses(runs[name, "straight"])
        assert list(truth) == [1, 2, 3, 4] and losses(runs[name, "stopped"]) == truth
        moved = losses(runs[name, "moved"])
        assert [x[0] for x in moved.values()] == pytest.approx([x[0] for x in truth.values()], rel=1e-5)
        stopped = Path(runs[name, "stopped"]["run_dir"])
        assert list(events_by_step(read_metrics(stopped), "eval")) == [2, 4]
        assert (stopped / "checkpoints" / "step-00000002").is_dir()  # the boundary

        out = tmp_path / f"{name}-export"
        assert main(["export", str(stopped), str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 128
        state = SavedState(checkpoint.find_newest(stopped))
        exported = load_file(out / "model.safetensors")
        assert exported.keys() == state.parameters()
        for parameter, x in exported.items():
            assert x.flatten().equal(state.read("param", parameter, 0, x.numel()).to(x.dtype)), parameter
    first = [losses(runs[name, "straight"])[1] for name in OPTIMIZERS]
    assert first[0][0] == first[1][0] and losses(runs["adamw", "straight"])[4] != losses(runs["muon", "straight"])[4]
