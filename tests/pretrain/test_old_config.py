"""Test the files of earlier versions: they are converted with one line of notice, and contradictions are refused."""

import json

import pytest

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.pretrain.config import load_model_of, parse_config
from lrnn.pretrain.deepspeed_config import deepspeed_config
from lrnn.pretrain.old_config import notice
from lrnn.pretrain.progress import check_same_run
from lrnn.pretrain.zero import zero_settings

SHIPPED = {"gradient_clipping": 1.0}  # in each of the three shipped files


@pytest.fixture(autouse=True)
def notices_come_again():
    notice.cache_clear()


@pytest.fixture
def parse(tmp_path):
    """`parse(optim, **changes)` returns the configuration of a run."""

    def parse(optim: dict | None = None, **changes):
        raw = {
            "run_dir": "x", "model": "x", "steps": 9, "global_batch_size": 8, "micro_batch_size": 2,
            "data": {"seq_len": 64, "corpora": [{"path": "a"}]}, "optim": {"lr": 0.1, **(optim or {})},
        }  # fmt: skip
        return parse_config(raw | changes, "run.yaml")

    return parse


@pytest.fixture
def write(tmp_path):
    """`write(content, name)` writes a DeepSpeed JSON and returns its path."""

    def write(content: dict, name: str = "own.json") -> str:
        (tmp_path / "deepspeed").mkdir(exist_ok=True)
        path = tmp_path / "deepspeed" / name
        path.write_text(json.dumps(content))
        return str(path)

    return write


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_shipped_settings_are_what_they_were():
    """The stages have the content of configs/deepspeed/zero1.json, zero2.json and zero3.json, which they replace."""
    common = {"overlap_comm": True, "reduce_bucket_size": 200000000}
    low = {"contiguous_gradients": True, "reduce_scatter": True, "allgather_bucket_size": 200000000}
    high = {"stage3_prefetch_bucket_size": 100000000, "stage3_param_persistence_threshold": 100000}
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    for stage, more in ((1, low), (2, low), (3, high)):
        zero = {"stage": stage, **common, **more}
        assert zero_settings(stage) == {"zero_optimization": zero, "torch_autocast": autocast}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("there", [True, False])
def test_a_shipped_json_becomes_a_stage(parse, write, capsys, stage, there):
    path = f"configs/deepspeed/zero{stage}.json"
    if there:
        path = write(zero_settings(stage) | SHIPPED, f"zero{stage}.json")
    config = parse(deepspeed=path)
    assert (config.zero, config.deepspeed, config.optim.clip) == (stage, None, 1.0)
    assert deepspeed_config(config, 1) == deepspeed_config(parse(zero=stage), 1)
    assert deepspeed_config(config, 1)["gradient_clipping"] == 1.0
    (line,) = said(capsys)
    assert line == (
        f"lrnn: notice: run.yaml: deepspeed: {path} is now zero: {stage}, its gradient_clipping is now optim.clip: 1.0"
    )


def test_a_shipped_json_that_was_changed_stays(parse, write, capsys):
    changed = zero_settings(2) | {"gradient_clipping": 0.5}
    changed["torch_autocast"]["enabled"] = False
    path = write(changed, "zero2.json")
    config = parse(deepspeed=path)
    assert (config.zero, config.deepspeed, config.optim.clip) == (None, path, 0.5)
    settings = deepspeed_config(config, 1)
    assert settings["gradient_clipping"] == 0.5 and not settings["torch_autocast"]["enabled"]
    (line,) = said(capsys)
    assert line == f"lrnn: notice: run.yaml: deepspeed: {path} stays, its gradient_clipping is now optim.clip: 0.5"


def test_a_json_without_clipping_still_turns_it_off(parse, write, capsys):
    path = write({"zero_optimization": {"stage": 1}})
    assert deepspeed_config(parse(deepspeed=path), 1)["gradient_clipping"] == 0
    assert len(said(capsys)) == 1
    assert deepspeed_config(parse({"clip": 2.0}, deepspeed=path), 1)["gradient_clipping"] == 2.0
    assert said(capsys) == []


def test_a_converted_configuration_is_not_converted_again(parse, write, capsys):
    for path in (write(zero_settings(3) | SHIPPED), write({"zero_optimization": {"stage": 1}, **SHIPPED}, "more.json")):
        config = parse(deepspeed=path)
        assert len(said(capsys)) == 1
        assert parse_config(config.model_dump(), "run.yaml") == config
        assert said(capsys) == []


def test_contradictions_are_refused(parse, write):
    own = write({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5})
    with pytest.raises(UserError, match=r"zero_optimization\.stage is 1, and zero of the run's configuration is 2"):
        deepspeed_config(parse(zero=2, deepspeed=own), 1)
    with pytest.raises(UserError, match=r"gradient_clipping is 0\.5, and optim\.clip of the run's configuration is 1"):
        deepspeed_config(parse({"clip": 1.0}, deepspeed=own), 1)
    gone = "configs/deepspeed/zero3.json"
    with pytest.raises(UserError, match=rf"zero is 2, and deepspeed: {gone} is stage 3"):
        parse(zero=2, deepspeed=gone)
    with pytest.raises(UserError, match=rf"optim\.clip is 0\.5, and gradient_clipping of deepspeed: {gone} is 1\.0"):
        parse({"clip": 0.5}, deepspeed=gone)
    assert deepspeed_config(parse({"clip": 0.5}, zero=1, deepspeed=own), 1)["zero_optimization"] == {"stage": 1}


def test_zero_is_2_by_default(parse):
    assert parse().zero == 2 and parse().optim.clip == 1.0
    with pytest.raises(UserError, match="key zero = 4: should be 1, 2 or 3"):
        parse(zero=4)


@pytest.mark.parametrize("length", [None, 64, 512])
def test_the_model_takes_the_sequence_length_of_the_data(parse, tmp_path, capsys, length):
    model = {"model_type": "lrnn", "vocab_size": 400} | ({} if length is None else {"max_position_embeddings": length})
    path = tmp_path / "model.json"
    path.write_text(json.dumps(model))
    assert load_model_of(parse(model=str(path))).max_position_embeddings == 64
    expected = [f"lrnn: notice: {path}: max_position_embeddings 512 gives way to data.seq_len 64"]
    assert said(capsys) == (expected if length == 512 else [])


def test_a_checkpoint_with_another_length_resumes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LrnnConfig(max_position_embeddings=512).to_dict()))
    (tmp_path / "progress.json").write_text(json.dumps({"data": {"seq_len": 64}}))
    model = LrnnConfig(max_position_embeddings=64)
    check_same_run(tmp_path, model, {"seq_len": 64})
    assert said(capsys) == [f"lrnn: notice: {tmp_path}: max_position_embeddings 512 gives way to data.seq_len 64"]
    with pytest.raises(UserError, match="was trained on data with seq_len = 64, now it is 32"):
        check_same_run(tmp_path, model, {"seq_len": 32})


def test_a_stream_is_the_same_by_one_of_its_fingerprints(tmp_path):
    """Checkpoints of 0.1.0 have only that of the configuration as it is written."""
    model = LrnnConfig()
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
    now = {"seed": 1, "tokenizer": "t", "stream": {"as given": "a", "from run_dir": "b"}}
    changes = {"data.stream.data_files": ("x", "y"), "data.stream.tokenizer": ("t", "u")}
    for before in ("a", {"as given": "a", "from run_dir": "c"}, {"as given": "c", "from run_dir": "b"}):
        (tmp_path / "progress.json").write_text(json.dumps({"data": now | {"stream": before}}))
        assert check_same_run(tmp_path, model, now) == set()
    for before in ("c", {"as given": "c", "from run_dir": "d"}):
        (tmp_path / "progress.json").write_text(json.dumps({"data": now | {"stream": before}}))
        with pytest.raises(UserError, match=r"on another stream: data.stream.data_files = 'x' \(now 'y'\); the pos"):
            check_same_run(tmp_path, model, now, changes=changes)
        with pytest.raises(UserError, match="was trained on data with seed = 1, now it is 2; the position"):
            check_same_run(tmp_path, model, now | {"seed": 2}, changes=changes)
        assert check_same_run(tmp_path, model, now, allow_change=True) == {"stream"}


@pytest.mark.parametrize(
    ("environment", "in_workers", "printed"),
    [
        ({}, False, True),  # a single process, or the launcher
        ({"RANK": "0", "LRNN_LAUNCHER": "1"}, False, False),  # its launcher has printed it
        ({"RANK": "0", "LRNN_LAUNCHER": "1"}, True, True),
        ({"RANK": "1", "LRNN_LAUNCHER": "1"}, True, False),
        ({"SLURM_PROCID": "0"}, False, True),
        ({"SLURM_PROCID": "1"}, False, False),
    ],
)
def test_one_process_of_a_run_gives_notice(monkeypatch, capsys, environment, in_workers, printed):
    for name in ("RANK", "SLURM_PROCID", "LRNN_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notice("x", in_workers=in_workers)
    assert said(capsys) == (["lrnn: notice: x"] if printed else [])


@pytest.mark.parametrize(("old", "new"), [(True, "full"), (False, "none"), ("mlp", "mlp")])
def test_activation_checkpointing_may_be_a_truth_value(parse, capsys, old, new):
    assert parse(activation_checkpointing=old).activation_checkpointing == new
    assert said(capsys) == []
