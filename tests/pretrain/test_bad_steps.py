"""Test losses that are spikes or not finite: they are named, and skipped or undone, the same on all ranks."""

import json
import math
import random
import shutil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from training_group import losses, run_group

from lrnn.pretrain.checkpoint import format as checkpoint
from lrnn.pretrain.config import SpikeConfig
from lrnn.pretrain.launch import STOPPED
from lrnn.pretrain.spike_rule import SpikeRule
from lrnn.records import read_metrics

SPIKES = {"window": 6, "threshold": 5.0}
QUICK = {"optim": {"lr": 0.04}, "schedule": {"name": "wsd", "warmup_steps": 1}}  # The loss soon hardly falls.
STRANGE = 10  # the step with wrong labels
STEPS = 13
G = 8  # samples per step


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_limit_is_median_and_deviation():
    rng = np.random.default_rng(0)
    found = SpikeRule(SpikeConfig(window=1000, threshold=6.0), rng.normal(3.0, 0.1, 1000).tolist())
    assert found.limit == pytest.approx(3.0 + 6 * 0.1, rel=0.02)
    # The factor follows from the quantiles of the normal distribution.
    assert 1 / NormalDist().inv_cdf(0.75) == pytest.approx(1.4826, abs=1e-4)


def test_no_limit_before_half_of_the_window():
    spikes = SpikeRule(SpikeConfig(window=10), [])
    for i in range(5):
        assert spikes.limit == math.inf
        spikes.accept(3.0 + 0.1 * i)
    assert spikes.limit < 10


def test_outliers_do_not_move_the_limit():
    rng = random.Random(0)
    calm = [rng.gauss(3.0, 0.05) for _ in range(64)]
    limit = SpikeRule(SpikeConfig(window=64), calm).limit
    for i in range(0, 64, 8):
        calm[i] = 100.0
    assert SpikeRule(SpikeConfig(window=64), calm).limit < limit + 0.2


def test_a_plateau_and_a_fall_are_no_spikes():
    spikes = SpikeRule(SpikeConfig(window=16), [2.5] * 16)
    assert 2.5 < 2.52 < spikes.limit < 2.6
    falling = SpikeRule(SpikeConfig(window=16), [])
    for step in range(500):
        loss = 2 + 6 * math.exp(-step / 30) + 0.02 * math.sin(step * 1.7)
        assert loss <= falling.limit, step
        falling.accept(loss)


def test_limit_is_a_float32_and_the_window_moves():
    spikes = SpikeRule(SpikeConfig(window=4), [9.0, 9.0, 1.0, 1.1, 1.3, 1.2])
    assert spikes.history == [1.0, 1.1, 1.3, 1.2] and spikes.limit == float(np.float32(spikes.limit))
    spikes.accept(1.5)
    assert spikes.history == [1.1, 1.3, 1.2, 1.5]


# --- in training ------------------------------------------------------------------------------------------------------


def events(config, name):
    return [r for r in read_metrics(Path(config["run_dir"])) if r.get("event") == name]


def spikes_at(config, step):
    """Return the spike records of a step. With a window this short, other steps are spikes too."""
    return [r for r in events(config, "loss_spike") if r["step"] == step]


def strange_samples() -> list[int]:
    """Return the samples of the last rank's last micro-batch: 4 micro-batches of 2 samples go to 2 ranks in turn."""
    first = (STRANGE - 1) * G
    return [first + 6, first + 7]


def test_a_spike_is_logged_or_skipped(base, tmp_path):
    def config(run, action):
        return base(run, steps=STEPS, spikes=SPIKES | {"action": action}, **QUICK)

    logged, skipped, calm = config("logged", "log"), config("skipped", "skip"), config("calm", "skip")
    resumed = config("resumed", "skip")
    specs = [{"config": c, "strange_at": STRANGE} for c in (logged, skipped, resumed)] + [{"config": calm}]
    specs.insert(2, {"config": resumed, "stop_at": STRANGE - 1})
    assert run_group(tmp_path, specs) == [0, 0, STOPPED, 0, 0]
    assert losses(resumed) == losses(skipped), "the checkpoint lacks the losses that decide what is a spike"
    for c, outcome in ((logged, "applied"), (skipped, "skipped")):
        (event,) = spikes_at(c, STRANGE)
        assert event["outcome"].startswith(outcome)
        assert event["samples"] == list(range((STRANGE - 1) * G, STRANGE * G))
        assert event["worst"][0]["samples"] == strange_samples()
        assert float(event["loss"]) > event["limit"] and len(event["worst"]) == 4
    assert not spikes_at(calm, STRANGE) and not events(calm, "skipped_step")
    saved = {name: checkpoint.find_newest(tmp_path / name) for name in ("logged", "skipped")}
    progress = {name: checkpoint.read_progress(folder)["progress"] for name, folder in saved.items()}
    n = len(events(skipped, "loss_spike"))
    assert [progress[name]["optimizer_step"] for name in ("logged", "skipped")] == [STEPS, STEPS - n]
    assert progress["skipped"]["skipped_steps"] == n and len(progress["skipped"]["losses"]) == SPIKES["window"]
    # The runs are the same up to the spike, and differ in one update after it.
    before = range(1, STRANGE)
    assert [losses(logged)[s] for s in before] == [losses(skipped)[s] for s in before]
    assert losses(logged)[STRANGE][0] == losses(skipped)[STRANGE][0] and losses(logged)[STEPS] != losses(skipped)[STEPS]


@pytest.mark.parametrize(("stage", "optimizer"), [(2, "adamw"), (3, "adamw"), (3, "muon")])
def test_a_rollback_is_a_resume_with_the_data_that_follow(base, tmp_path, stage, optimizer):
    """After a spike in step 10 the run continues from step 8 with the samples after step 10.

    It is bitwise the same as a run that is resumed by hand from that checkpoint, with the position in the data moved.
    Stage 1 keeps its state as stage 2 does.
    """
    settings = {
        "steps": STEPS, "spikes": SPIKES | {"action": "rollback"}, "checkpoint": {"every": 4, "keep_last": 10},
        "log": {"every": 1, "tensorboard": False}, "micro_batch_size": 4,
        **QUICK, "optim": QUICK["optim"] | {"name": optimizer},
    }  # fmt: skip
    rolled, by_hand = base("rolled", stage, **settings), base("by-hand", stage, **settings)
    assert run_group(tmp_path, [{"config": rolled, "strange_at": STRANGE}]) == [0]
    (event,) = events(rolled, "rollback")
    assert event["step"] == STRANGE and event["to"].endswith("step-00000008")
    records = [r["step"] for r in read_metrics(tmp_path / "rolled") if "loss" in r and "event" not in r]
    assert records == [*range(1, STRANGE), *range(9, STEPS + 1)]

    folder = tmp_path / "by-hand/checkpoints/step-00000008"
    shutil.copytree(tmp_path / "rolled/checkpoints/step-00000008", folder)
    progress = checkpoint.read_progress(folder)
    assert progress["progress"]["samples"] == 8 * G
    progress["progress"]["samples"] = STRANGE * G
    (folder / "progress.json").write_text(json.dumps(progress))
    files = checkpoint.verify(tmp_path / "rolled/checkpoints/step-00000008")["files"]
    checkpoint.write_manifest(folder, 8, files | {"progress.json": checkpoint.seal(folder / "progress.json")})
    assert run_group(tmp_path, [{"config": by_hand}]) == [0]
    truth, found = losses(by_hand), losses(rolled)
    assert list(truth) == list(range(9, STEPS + 1))
    assert {step: found[step] for step in truth} == truth
    final = {run: checkpoint.read_progress(checkpoint.find_newest(tmp_path / run))["progress"] for run in
             ("rolled", "by-hand")}  # fmt: skip
    assert final["rolled"].pop("rollbacks") == 1 and final["by-hand"].pop("rollbacks") == 0
    assert final["rolled"].pop("skipped_steps") == 1 and final["by-hand"].pop("skipped_steps") == 0
    assert final["rolled"] == final["by-hand"] and final["rolled"]["samples"] == (STEPS + 2) * G


def test_a_rollback_without_a_checkpoint_and_too_many(base, tmp_path):
    """Without a checkpoint to return to, the step is skipped. If every step is a spike, the run stops and says why."""
    spikes = SPIKES | {"action": "rollback", "max_rollbacks": 1}
    changes = {"micro_batch_size": 4, "log": {"every": 1, "tensorboard": False}, **QUICK}
    early = base("early", steps=STEPS, spikes=spikes, **changes)
    # The limit is below every loss: every step is a spike as soon as there is a limit.
    never = spikes | {"threshold": 1e-9, "window": 4}
    hopeless = early | {"run_dir": str(tmp_path / "hopeless"), "spikes": never, "optim": {"lr": 1e-9}}
    hopeless |= {"checkpoint": {"every": 1, "keep_last": 10}, "max_skipped_steps": 50, "steps": 60}
    statuses = run_group(
        tmp_path, [{"config": early, "strange_at": STRANGE}, {"config": hopeless, "strange_at": 4}], processes=1
    )
    assert statuses[0] == 0 and not events(early, "rollback")
    (spike,) = spikes_at(early, STRANGE)
    assert spike["outcome"] == "skipped"
    assert checkpoint.read_progress(checkpoint.find_newest(tmp_path / "early"))["progress"]["skipped_steps"] >= 1
    assert "2 rollbacks to" in statuses[1] and "spikes.max_rollbacks is 1" in statuses[1], statuses[1]
    assert "metrics.jsonl under event loss_spike" in statuses[1]
