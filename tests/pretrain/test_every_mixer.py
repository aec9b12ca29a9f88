"""Pretrain, stop and resume every token mixer, all in one process.

`test_training.py` does so with one mixer in groups of processes, in every ZeRO stage and after every step.
"""

import json

import pytest
from training_group import losses, run_group

from lrnn.model.mixers import MIXERS
from lrnn.pretrain.launch import STOPPED


@pytest.fixture
def configs(base, tmp_path, model_json):
    """`configs(mixer)` returns the configuration of a run, and the same for another folder."""

    def make(mixer):
        fields = json.loads(model_json.read_text()) | {"mixer": mixer, "state_size": 4, "num_hidden_layers": 1}
        path = tmp_path / f"{mixer}.json"
        path.write_text(json.dumps(fields))
        changes = {"model": str(path), "steps": 3, "global_batch_size": 4}
        return [base(f"{mixer}-{run}", stage=2, **changes) for run in ("straight", "stopped")]

    return make


def test_stop_and_resume_is_bitwise_the_same(configs, tmp_path):
    runs = {mixer: configs(mixer) for mixer in MIXERS}
    specs = [
        spec
        for straight, stopped in runs.values()
        for spec in ({"config": straight}, {"config": stopped, "stop_at": 1}, {"config": stopped})
    ]
    statuses = run_group(tmp_path, specs, processes=1)
    assert statuses == [0, STOPPED, 0] * len(MIXERS)
    for mixer, (straight, stopped) in runs.items():
        truth = losses(straight)
        assert list(truth) == [1, 2, 3] and truth == losses(stopped), mixer
