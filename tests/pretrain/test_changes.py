"""Test which changes of a configuration change the results of a run that resumes."""

import copy
import json

import pytest

from lrnn.errors import UserError
from lrnn.pretrain.changes import check_changes, find_changes, flatten
from lrnn.pretrain.config import Config, parse_config
from lrnn.pretrain.deepspeed_config import COPY
from lrnn.settings import dump

RUN = {
    "run_dir": "runs/x", "model": "m.json", "steps": 100, "global_batch_size": 8, "micro_batch_size": 2,
    "data": {"seq_len": 64, "corpora": [{"path": "a"}]}, "optim": {"lr": 0.001},
}  # fmt: skip
OTHERS = {  # another value of every key, by what it is
    "free": {
        "run_dir": "y", "zero": 3, "micro_batch_size": 4, "activation_checkpointing": "full", "max_skipped_steps": 9,
        "fused_layers": False, "profile.steps": [1, 2],
        "checkpoint.every": 7, "checkpoint.keep_last": 7, "checkpoint.keep_every": 7, "checkpoint.background": False,
        "log.every": 7, "log.heldout_every": 7, "log.heldout_batches": 7, "log.tensorboard": False,
        "log.wandb_project": "p", "watchdog.lost_seconds": 7.0, "watchdog.stall_seconds": 7.0,
        "watchdog.startup_seconds": 7.0, "watchdog.heartbeat_seconds": 7.0, "spikes.max_rollbacks": 7,
    },
    "changes the results": {
        "steps": 200, "global_batch_size": 16, "precision": "float32", "optim.lr": 0.002, "optim.betas": [0.9, 0.99],
        "optim.eps": 1e-6, "optim.weight_decay": 0.2, "optim.clip": 0.0, "optim.decay_embeddings": False,
        "optim.z_loss": 1e-4, "optim.muon.lr": 0.02, "optim.muon.momentum": 0.9, "optim.muon.nesterov": False,
        "optim.muon.adjust_lr_fn": "original", "optim.muon.per_head": True, "schedule.name": "wsd",
        "schedule.warmup_steps": 5, "schedule.decay_steps": 5, "schedule.min_lr_ratio": 0.0, "spikes.action": "skip",
        "spikes.threshold": 7.0, "spikes.window": 7,
    },
    "compared by content": {
        "model": "n.json", "init_from": "models/x", "seed": 1, "data.seq_len": 32,
        "data.corpora": [{"path": "b", "weight": 1.0}],
        "data.reset_at_document_boundaries": True, "data.state_passing": 4,
    },
}  # fmt: skip
REST = {"deepspeed", "data.stream", "optim.name", "stages"}  # tested below, other data, or in test_stages.py
WATCHED = {  # keys that need each other
    "eval.every": 7, "eval.tasks": ["a"], "eval.limit": 7, "eval.batch_size": 7, "eval.max_length": 7,
    "eval.truncate": True, "eval.num_fewshot": 7, "eval.include_path": ["x"], "samples.every": 7,
    "samples.prompts": ["a"], "samples.max_new_tokens": 7, "samples.temperature": 0.7,
}  # fmt: skip
REST |= {*WATCHED, "eval.suite", "samples.prompt_file"}


def changed(**values) -> Config:
    raw = copy.deepcopy(RUN)
    for key, value in values.items():
        *parents, last = key.split(".")
        target = raw
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return parse_config(raw, "run.yaml")


@pytest.fixture
def check(tmp_path):
    """`check(config, allow)` compares a configuration with that of a checkpoint of RUN."""
    (tmp_path / "run.yaml").write_text(dump(changed()))
    return lambda config, allow=False: check_changes(tmp_path, config, allow)


def test_every_key_is_one_or_the_other():
    named = {key for group in OTHERS.values() for key in group} | REST
    assert named == set(flatten(changed().model_dump())), "say in this file whether the new key changes the results"


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in OTHERS.items() for key in keys])
def test_a_changed_key(check, kind, key):
    value = OTHERS[kind][key]
    config = changed(**{key: value})
    before = flatten(changed().model_dump())[key]
    assert check(config, True) == {key: (before, value)}
    if kind == "changes the results":
        with pytest.raises(UserError) as caught:
            check(config)
        assert f"was trained with {key} = {before!r} (now {value!r}), which changes the results; add" in str(
            caught.value
        )
    else:
        assert check(config) == {key: (before, value)}


def test_a_run_that_is_watched_from_now_on(check):
    assert check(changed(**WATCHED)).keys() == WATCHED.keys()
    others = {"eval.every": 7, "eval.suite": "fast", "samples.every": 7, "samples.prompt_file": "x"}
    assert check(changed(**others)).keys() == others.keys()


def test_nothing_changed(check):
    assert check(changed()) == {}
    assert check(changed(**{"optim.weight_decay": 0.01, "zero": 2})) == {}  # what was the default before


def test_a_checkpoint_that_is_older_than_a_key():
    before = changed().model_dump()
    del before["max_skipped_steps"], before["watchdog"]
    assert find_changes(before, changed()) == {}
    assert find_changes(before, changed(max_skipped_steps=9)) == {"max_skipped_steps": (5, 9)}
    assert find_changes(before | {"gone": 3}, changed()) == {"gone": (3, None)}


def test_a_checkpoint_of_0_1_0_with_a_deepspeed_json(tmp_path):
    """Its configuration has no key `precision`, and the JSON turns autocast off."""
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    config = changed(deepspeed=str(tmp_path / "own.json"))
    before = config.model_dump()
    del before["precision"], before["zero"]
    assert find_changes(before, config) == {}


def test_a_deepspeed_json_that_is_not_there_any_more(tmp_path):
    """Its path may be relative to the folder in which the run was started."""
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    config = changed(deepspeed=str(tmp_path / "own.json"))
    before = config.model_dump() | {"deepspeed": "elsewhere/own.json"}
    assert find_changes(before, config).keys() == {"deepspeed"}


@pytest.mark.parametrize(("autocast", "refused"), [(True, False), (False, True)])
def test_a_deepspeed_json_counts_by_its_precision(check, tmp_path, autocast, refused):
    engine = {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": autocast}, "gradient_clipping": 1.0}
    (tmp_path / "own.json").write_text(json.dumps(engine))
    config = changed(deepspeed=str(tmp_path / "own.json"))
    if refused:
        with pytest.raises(UserError, match=r"precision = 'bfloat16' \(now 'float32'\)"):
            check(config)
    assert check(config, refused).keys() == {"deepspeed", "zero", *(["precision"] if refused else [])}


AUTOCAST = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
JSON = {"zero_optimization": {"stage": 1}, "torch_autocast": AUTOCAST}
SETTINGS = {  # other contents of the same file: the settings that change the results, as they are named
    "same": (JSON, {}),
    "free": (JSON | {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}, "steps_per_print": 3}, {}),
    "decided by the run": (JSON | {"gradient_clipping": 1.0, "train_batch_size": 3}, {}),
    "lower precision": (JSON | {"communication_data_type": "fp16"}, {"communication_data_type": (None, "fp16")}),
    "another dtype": (
        JSON | {"torch_autocast": AUTOCAST | {"dtype": "float16"}},
        {"torch_autocast.dtype": ("bfloat16", "float16")},
    ),
    "quantized": (
        JSON | {"zero_optimization": {"stage": 1, "zero_quantized_gradients": True}},
        {"zero_optimization.zero_quantized_gradients": (None, True)},
    ),
    "deeper": (
        JSON | {"data_types": {"grad_accum_dtype": "bf16"}},
        {"data_types.grad_accum_dtype": (None, "bf16")},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_content_of_a_deepspeed_json(tmp_path, name):
    """It is compared with the copy in the checkpoint, because the file at the same path may be another by now."""
    content, changes = SETTINGS[name]
    changes = {f"deepspeed.{key}": values for key, values in changes.items()}
    own = tmp_path / "own.json"
    own.write_text(json.dumps(content))
    config = changed(deepspeed=str(own))
    (tmp_path / "run.yaml").write_text(dump(config))
    assert check_changes(tmp_path, config, False) == {}, "an older checkpoint has no copy"
    (tmp_path / COPY).write_text(json.dumps(JSON))
    if changes:
        ((key, (before, now)),) = changes.items()
        with pytest.raises(UserError) as caught:
            check_changes(tmp_path, config, False)
        assert f"was trained with {key} = {before!r} (now {now!r}), which changes the results; add" in str(caught.value)
    assert check_changes(tmp_path, config, True) == changes


def test_autocast_that_was_turned_off_in_the_same_file(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = changed(deepspeed=str(tmp_path / "own.json"))
    (tmp_path / "run.yaml").write_text(dump(config))
    (tmp_path / COPY).write_text(json.dumps(JSON))
    with pytest.raises(UserError, match=r"precision = 'bfloat16' \(now 'float32'\)"):
        check_changes(tmp_path, config, False)


def test_a_deepspeed_json_in_place_of_own_settings(check, tmp_path):
    """And the other way round: what the file sets beside `zero` and `precision` is a change."""
    own = tmp_path / "own.json"
    settings = JSON | {"gradient_clipping": 1.0}
    own.write_text(json.dumps(settings))
    assert check(changed(deepspeed=str(own))).keys() == {"deepspeed", "zero"}
    own.write_text(json.dumps(settings | {"communication_data_type": "fp16"}))
    config = changed(deepspeed=str(own))
    with pytest.raises(UserError, match=r"deepspeed.communication_data_type = None \(now 'fp16'\)"):
        check(config)
    (tmp_path / "run.yaml").write_text(dump(config))
    (tmp_path / COPY).write_text(own.read_text())
    with pytest.raises(UserError, match=r"deepspeed.communication_data_type = 'fp16' \(now None\)"):
        check(changed())


@pytest.mark.parametrize("allow", [False, True])
def test_another_optimizer_is_refused(check, allow):
    message = "holds the state of optim.name = 'adamw', and 'muon' cannot continue from it; restore 'adamw', or"
    with pytest.raises(UserError, match=message):
        check(changed(**{"optim.name": "muon"}), allow)
