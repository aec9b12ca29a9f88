"""Runs that are evaluated and generate samples on a GPU: training computes the same bits, in bfloat16 under ZeRO-1."""

from pathlib import Path

import pytest
from gpu_runs import needs_two_gpus, run_group
from training_group import losses, state_of

from lrnn.pretrain.checkpoint.format import list_checkpoints
from lrnn.records import events_by_step, read_metrics

WATCHED = {
    "eval": {"every": 3, "tasks": ["lrnn_parity_mc"], "limit": 33, "max_length": 2048},
    "samples": {"every": 2, "prompts": ["def f(x):", "import"], "max_new_tokens": 8},
}


@pytest.mark.parametrize("processes", [1, needs_two_gpus])
def test_training_computes_the_same_bits(base, tmp_path, processes):
    plain, watched = base("plain"), base("watched", **WATCHED)
    assert run_group(tmp_path, [{"config": plain}, {"config": watched}], processes) == [0, 0]
    assert losses(watched) == losses(plain) and len(losses(plain)) == 8
    states = [state_of(list_checkpoints(Path(config["run_dir"]))[-1]) for config in (plain, watched)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    assert [key for key, x in states[0].items() if not x.equal(states[1][key])] == []
    records = read_metrics(Path(watched["run_dir"]))
    assert {*events_by_step(records, "eval")} == {3, 6, 8} and {*events_by_step(records, "samples")} == {2, 4, 6, 8}
    failed = [r for r in records if r.get("event") == "eval_failed"]
    assert not failed, failed
