"""Pretrain and resume every token mixer, all in one process.

`test_training.py` stops a run of one mixer after every step, in groups of processes and in every ZeRO stage.
"""

import json
import shutil
from pathlib import Path

import pytest
from training_group import losses, run_group

from lrnn.model.mixers import MIXERS


@pytest.fixture
def configs(base, tmp_path, model_json):
    """`configs(mixer, name)` returns the configuration of a run, and the same for another folder."""

    def make(mixer, name=None):
        name = name or mixer
        fields = json.loads(model_json.read_text()) | {"mixer": mixer, "state_size": 4}
        fields["num_hidden_layers"] = 1 if isinstance(mixer, str) else 4
        path = tmp_path / f"{name}-{len(str(mixer))}.json"
        path.write_text(json.dumps(fields))
        changes = {"model": str(path), "steps": 3, "global_batch_size": 2}
        changes |= {"checkpoint": {"every": 1, "keep_last": 10}, "log": {"every": 1, "tensorboard": False}}
        return [base(f"{name}-{run}", **changes) for run in ("straight", "resumed")]

    return make


def test_a_resume_is_bitwise_the_same(configs, tmp_path):
    runs = {mixer: configs(mixer) for mixer in MIXERS}
    # A pattern that ends in the middle, with options of its own. It resumes in another spelling.
    attention = {"mixer": "attention", "num_heads": 1, "head_dim": 8}
    spelled = ["rwkv7", attention | {"mixer": "transformer"}, "mamba", "rwkv7"]
    runs["hybrid"] = [configs(["rwkv7", attention, "mamba"], "hybrid")[0], configs(spelled, "hybrid")[1]]
    straight, resumed = ([{"config": pair[i]} for pair in runs.values()] for i in range(2))
    assert run_group(tmp_path, straight, processes=1) == [0] * len(runs)
    for pair in runs.values():
        before, after = (Path(config["run_dir"]) / "checkpoints/step-00000001" for config in pair)
        shutil.copytree(before, after)
    assert run_group(tmp_path, resumed, processes=1) == [0] * len(runs)
    for mixer, pair in runs.items():
        truth, found = map(losses, pair)
        assert list(truth) == [1, 2, 3] and list(found) == [2, 3], mixer
        assert {step: truth[step] for step in found} == found, mixer
