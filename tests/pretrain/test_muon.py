"""Compare Muon under ZeRO with plain float64, one matrix at a time, and its state after skipped steps and elsewhere.

`test_training.py` and `test_bad_steps.py` resume and roll back with it.
"""

import shutil
from pathlib import Path

import pytest
from muon_truth import CLIP, DECAY, LR, MATRICES, RATIO, SCALES, STEPS, plain_training
from training_group import run_group, state_of

from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.checkpoint.reader import SavedState
from lrnn.records import read_metrics


@pytest.mark.parametrize(
    ("adjust", "per_head", "z_loss", "stages"),
    [("match_rms_adamw", False, 0.0, (1, 3)), ("original", True, 0.01, (2,))],
)
def test_steps_are_those_of_plain_float64(base, tmp_path, adjust, per_head, z_loss, stages):
    """Two processes, so that ZeRO cuts some of the matrices (1, 2) or all of them (3)."""
    muon = {"lr": RATIO * LR, "adjust_lr_fn": adjust, "per_head": per_head}
    optim = {"name": "muon", "lr": LR, "weight_decay": DECAY, "clip": CLIP, "decay_embeddings": False}
    optim |= {"muon": muon, "z_loss": z_loss}
    changes = {"steps": STEPS, "optim": optim, "schedule": {"name": "wsd", "warmup_steps": 2}}
    runs = [base(f"run-{stage}", stage, **changes) for stage in stages]
    truth, norms, zs, model, kept = plain_training(runs[0], per_head, SCALES[adjust])
    assert max(norms) > 1.2 * CLIP and truth[-1] < truth[0]
    assert run_group(tmp_path, [{"config": raw} for raw in runs]) == [0] * len(runs)
    for raw in runs:
        records = [r for r in read_metrics(Path(raw["run_dir"])) if "event" not in r]
        assert [r["loss"] for r in records] == pytest.approx(truth, rel=1e-5)
        assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
        assert [r.get("z_loss") for r in records] == (pytest.approx(zs, rel=1e-5) if z_loss else [None] * STEPS)
        state = SavedState(checkpoint.find_newest(Path(raw["run_dir"])))
        for name, p in model.named_parameters():
            found = state.read("param", name, 0, p.numel()).view_as(p)
            assert (found - p).norm() < 1e-4 * p.norm(), name
            kind = "momentum_buffer" if name.split(".")[-2] in MATRICES else "exp_avg"
            found = state.read(kind, name, 0, p.numel()).view_as(p)
            assert (found - kept[name]).norm() < 1e-3 * kept[name].norm(), name


def test_a_skipped_step_and_another_number_of_processes(base, tmp_path):
    """A step with a gradient that is not finite leaves everything as it was; one process continues what two began."""

    def config(name, stage=2):
        optim = {"name": "muon", "lr": LR, "weight_decay": DECAY}
        changes = {"optim": optim, "schedule": {"name": "wsd", "warmup_steps": 1}}
        return base(name, stage, steps=STEPS, checkpoint={"every": 1, "keep_last": 9}, **changes)

    specs = [{"config": config("straight")}, {"config": config("poisoned"), "poison_at": STEPS}]
    assert run_group(tmp_path, specs) == [0, 0]
    two, before, last = (f"step-{step:08d}" for step in (2, STEPS - 1, STEPS))
    straight = tmp_path / "straight/checkpoints"
    found, truth = state_of(tmp_path / "poisoned/checkpoints" / last), state_of(straight / before)
    assert found.keys() == truth.keys() and all(found[key].equal(x) for key, x in truth.items())

    shutil.copytree(straight / two, tmp_path / "moved/checkpoints" / two)
    assert run_group(tmp_path, [{"config": config("moved", stage=3)}], processes=1) == [0]
    found, truth = state_of(tmp_path / "moved/checkpoints" / last), state_of(straight / last)
    assert found.keys() == truth.keys()
    for key, x in truth.items():
        assert (found[key] - x).norm() <= 1e-4 * x.norm(), key
