"""State passing on a GPU at the length that it is for: 16 samples of 2,048 tokens against one of 32,768, in float32."""

from pathlib import Path

import numpy as np
import pytest
from gpu_runs import ON_GPU, run_group

from lrnn.records import read_metrics

SHORT, CHAIN, ROWS = (2048, 16, 2) if ON_GPU else (16, 4, 2)
FORMS = {
    "plain": {"fused_layers": False},
    "packed": {"fused_layers": False, "packed": True},
    "fused": {"fused_layers": True},
    "fused packed": {"fused_layers": True, "packed": True},
}
STILL = {"precision": "float32", "optim": {"lr": 1e-12, "weight_decay": 0.0}, "schedule": {"warmup_steps": 0}}
STILL |= {"log": {"every": 1, "tensorboard": False}, "global_batch_size": ROWS, "micro_batch_size": ROWS}


def runs_of(base, form, fields):
    """Return the configurations of one step of long samples, and of as many steps of short ones as they have."""

    def config(name, steps, **data):
        data = {**base("x")["data"], **data, "reset_at_document_boundaries": fields.get("packed", False)}
        return base(f"{form} {name}", **STILL, steps=steps, data=data, fused_layers=fields["fused_layers"])

    return config("long", 1, seq_len=SHORT * CHAIN), config("short", CHAIN, seq_len=SHORT, state_passing=CHAIN)


def test_the_loss_is_that_of_whole_samples(base, tmp_path):
    """All runs are those of one process, because its start takes longer than they do."""
    forms = FORMS if ON_GPU else {form: fields for form, fields in FORMS.items() if not fields["fused_layers"]}
    runs = {form: runs_of(base, form, fields) for form, fields in forms.items()}
    configs = [config for pair in runs.values() for config in pair]
    assert run_group(tmp_path, [{"config": config} for config in configs], processes=1) == [0] * len(configs)
    for form, pair in runs.items():
        long, short = ([r for r in read_metrics(Path(c["run_dir"])) if "event" not in r] for c in pair)
        labels = np.diff([0, *(r["tokens"] for r in short)])
        assert labels.sum() == long[0]["tokens"] and len(short) == CHAIN
        found = np.average([r["loss"] for r in short], weights=labels)
        print(f"{form}: {found:.8f} and {long[0]['loss']:.8f}, apart by {abs(found / long[0]['loss'] - 1):.1e}")
        assert found == pytest.approx(long[0]["loss"], rel=2e-6), form
