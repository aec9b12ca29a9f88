"""Test the configuration of a run: errors name the key by its full path and say what would be right."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from lrnn import LrnnConfig
from lrnn.errors import UserError
from lrnn.model.mixers import MIXERS
from lrnn.model_config import load_model_config
from lrnn.parsing import parse_yaml
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.pretrain.deepspeed_config import deepspeed_config
from lrnn.pretrain.engine import compute_dtype
from lrnn.pretrain.fused.choice import uses_fused_layers
from lrnn.pretrain.zero import zero_settings
from lrnn.settings import dump

ROOT = Path(__file__).parents[2]


@pytest.fixture
def raw():
    """Return a small valid configuration, as parsed YAML."""
    return {
        "run_dir": "runs/x",
        "model": "model.json",
        "zero": 2,
        "steps": 100,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "data": {"seq_len": 64, "corpora": [{"path": "a"}, {"path": "b", "weight": 2}]},
        "optim": {"lr": 0.001},
    }


@pytest.fixture
def load(raw, tmp_path):
    """`load(*overrides)` writes `raw` to run.yaml and reads it."""

    def load(*overrides: str) -> Config:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        return load_config(tmp_path / "run.yaml", overrides)

    return load


def error_of(function, *arguments) -> str:
    """Return the message of the UserError, which has one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_valid(load):
    config = load()
    assert config.data.corpora[1].weight == 2.0 and isinstance(config.data.corpora[1].weight, float)
    assert config.schedule.name == "cosine" and config.log.every == 10


@pytest.mark.parametrize(
    ("name", "most"), [("tiny", 2), ("340m", 16), ("1.3b", 128), ("1.3b-hybrid", 128), ("7b-hybrid", 512)]
)
def test_shipped_configurations(name, most):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model = load_model_of(config.model_copy(update={"model": str(ROOT / config.model)}))
    assert model.max_position_embeddings == config.data.seq_len
    for world_size in (2**i for i in range(most.bit_length())):
        settings = deepspeed_config(config, world_size)
        per_step = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * world_size
        assert per_step == settings["train_batch_size"] == config.global_batch_size


def test_the_documented_job_can_share_its_batch():
    """For `sbatch --nodes N slurm/train.sbatch CONFIG`, the samples of a step divide evenly among N x 8 processes."""
    text = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    jobs = re.findall(r"sbatch --nodes (\d+) slurm/train\.sbatch ([\w./-]+)", text)
    (tasks,) = re.findall(r"#SBATCH --ntasks-per-node=(\d+)", (ROOT / "slurm" / "train.sbatch").read_text())
    assert jobs
    for nodes, name in jobs:
        config = load_config(ROOT / name)
        assert deepspeed_config(config, int(nodes) * int(tasks))["gradient_accumulation_steps"] >= 1


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("step=3", "step", "did you mean steps?"),
        (
            "optim.learning=3",
            "optim.learning",
            "valid: name, lr, betas, eps, weight_decay, decay_embeddings, z_loss, clip, muon",
        ),
        ("optim.weight_decy=0.1", "optim.weight_decy", "did you mean weight_decay?"),
        ("checkpoint.keep_lst=2", "checkpoint.keep_lst", "did you mean keep_last?"),
        ("log.heldout_evry=2", "log.heldout_evry", "did you mean heldout_every?"),
        ("data.corpora=[{path: a}, {path: b, wieght: 2}]", "data.corpora.1.wieght", "did you mean weight?"),
        ("data.stream={path: a, tokeniser: b}", "data.stream.tokeniser", "did you mean tokenizer?"),
        ("schedules.name=wsd", "schedules", "did you mean schedule?"),
    ],
)
def test_unknown_key(load, override, key, hint):
    message = error_of(load, override)
    assert f"command line: unknown key {key}; {hint}" in message


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("steps='100'", "key steps = '100': should be a valid integer"),
        ("steps=true", "key steps = True: should be a valid integer"),
        ("steps=100.0", "key steps = 100.0: should be a valid integer"),
        ("steps=1e2", "key steps = 100.0: should be a valid integer"),
        ("steps=0", "key steps = 0: should be greater than 0"),
        ("steps=", "key steps = None: should be a valid integer"),
        ("seed=-1", "key seed = -1: should be greater than or equal to 0"),
        ("optim.lr='3e-4'", "key optim.lr = '3e-4': should be a valid number"),
        ("optim.lr=true", "key optim.lr = True: should be a valid number"),
        ("optim.lr=.inf", "key optim.lr = inf: should be a finite number"),
        ("optim.lr=.nan", "key optim.lr = nan: should be "),
        ("optim.eps=0.0", "key optim.eps = 0.0: should be greater than 0"),
        ("optim.betas=[0.9]", "key optim.betas = [0.9]: List should have at least 2 items"),
        ("optim.betas=[0.9, 0.95, 0.99]", "key optim.betas = [0.9, 0.95, 0.99]: List should have at most 2 items"),
        ("optim.betas=[0.9, 1.0]", "key optim.betas.1 = 1.0: should be less than 1"),
        ("log.tensorboard=1", "key log.tensorboard = 1: should be a valid boolean"),
        ("data.seq_len=two", "key data.seq_len = 'two': should be a valid integer"),
        ("data.corpora=[{path: a}, {path: b, weight: 0}]", "key data.corpora.1.weight = 0: should be greater than 0"),
        ("data.corpora=[{path: 3}]", "key data.corpora.0.path = 3: should be a valid string"),
        ("data.corpora=a", "key data.corpora = 'a': should be a valid list"),
        ("schedule.name=linear", "key schedule.name = 'linear': should be 'cosine' or 'wsd'"),
        ("log=", "key log = None: should be a valid dictionary"),
    ],
)
def test_wrong_value(load, override, start):
    assert start in error_of(load, override)


def test_missing_keys(raw, load):
    del raw["optim"]["lr"]
    assert "key optim.lr is missing" in error_of(load)
    del raw["run_dir"]
    assert all(f"key {key} is missing" in error_of(load) for key in ("optim.lr", "run_dir"))
    assert "key data.corpora.0.path is missing" in error_of(load, "data.corpora=[{weight: 2}]")


def test_all_errors_are_named_at_once(load):
    message = error_of(load, "optim.lr=-1", "stpes=3")
    assert "optim.lr = -1" in message and "stpes; did you mean steps?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps' should look like key.sub=value"),
        ("steps.x=3", "override steps.x: steps holds a value, not a section"),
        ("data.corpora.0.path=c", "override data.corpora.0.path: corpora holds a value, not a section"),
        ("optim.lr=[1", "override optim.lr=[1: the value is not YAML"),
        ("=3", "override '=3' should look like key.sub=value"),
        ("steps=2026-13-45", "override steps=2026-13-45: the value is not YAML: month must be in 1..12"),
        ("run_dir=''", "command line: run_dir is empty; give a path"),
        ("run_dir=$EMPTY", "command line: run_dir is empty; give a path"),
        ("data.corpora=[{path: ''}]", "command line: data.corpora.0.path is empty; give a path"),
        ("model={base: ''}", "command line: model.base is empty; give a path"),
    ],
)
def test_bad_override(load, monkeypatch, override, message):
    monkeypatch.setenv("EMPTY", "")
    assert message in error_of(load, override)


def test_overrides_are_yaml(load):
    config = load("optim.lr=3e-4", "schedule.name=wsd", "log.wandb_project=a=b", "data.corpora=[{path: c}]", "seed=7")
    assert config.optim.lr == 3e-4 and config.schedule.name == "wsd" and config.seed == 7
    assert config.log.wandb_project == "a=b"
    assert [(c.path, c.weight) for c in config.data.corpora] == [("c", 1.0)]
    assert load("optim.lr=1", "optim.lr=2").optim.lr == 2.0  # the last one counts


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "3E-4", "0.3e-3", ".3e-3", "3.e-4", "+3e-4", "0.0003"])
def test_floats_without_a_dot(load, text, raw, tmp_path):
    assert load(f"optim.lr={text}").optim.lr == 3e-4
    del raw["optim"]
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(raw) + f"optim:\n  lr: {text}\n")
    assert load_config(tmp_path / "f.yaml").optim.lr == 3e-4


@pytest.mark.parametrize("text", ["e4", "3e", "1e4x", "a3e4", "0x3e4z", "commit-3e4"])
def test_words_stay_words(load, text):
    assert load(f"run_dir={text}").run_dir == text


def test_one_source_of_data(raw, load):
    assert "exactly one of corpora" in error_of(load, "data.stream={path: json, tokenizer: t}")
    assert "key data = " in error_of(load, "data.corpora=[]")
    assert "exactly one of corpora (written by `lrnn corpus`) and stream" in error_of(load, "data.corpora=[]")
    assert load("data.corpora=[]", "data.stream={path: json, tokenizer: t}").data.stream.split == "train"


def test_schedule_must_fit(load):
    load("schedule.warmup_steps=60", "schedule.decay_steps=40", "schedule.name=wsd")
    message = error_of(load, "schedule.warmup_steps=60", "schedule.decay_steps=41", "schedule.name=wsd")
    assert "schedule.warmup_steps 60 + schedule.decay_steps 41 is more than steps 100" in message
    assert "schedule.warmup_steps 101" in error_of(load, "schedule.warmup_steps=101")


def test_bad_file(tmp_path):
    file = tmp_path / "run.yaml"
    assert f"configuration {file} does not exist" in error_of(load_config, file)
    file.write_text("- a\n- b\n")
    assert "is not a mapping of keys to values" in error_of(load_config, file)
    file.write_text("")
    assert "is not a mapping of keys to values" in error_of(load_config, file)
    file.write_text("a: [1\nb: {\n")
    assert f"{file} is not YAML" in error_of(load_config, file)
    for value in ("2026-13-45", "0x_", "!!int x", "!!float x", "9" * 5000, "[" * 3000):
        file.write_text(f"steps: {value}\n")
        assert f"{file} is not YAML" in error_of(load_config, file), value[:20]
    file.write_bytes(b"steps: \xff\xfe")
    assert f"{file} is not UTF-8 text" in error_of(load_config, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\nseed: 1\nsteps: 4\n", "run.yaml:3: key steps is given twice, first in line 1; remove one"),
        ("optim:\n  lr: 1\n  lr: 1\n", "run.yaml:3: key lr is given twice, first in line 2; remove one"),
        ("a:\n- {b: 1}\n- {b: 1, 'b': 1}\n", "run.yaml:3: key b is given twice, first in line 3; remove one"),
        ("a: {<<: {b: 1},\n <<: {c: 1}}\n", "run.yaml:2: key << is given twice, first in line 1; write one list"),
        ("steps: 3\n3: 4\n", "run.yaml:2: key 3 should be text; write it in quotes"),
        ("steps: 3\non: 4\n", "run.yaml:2: key True should be text; write it in quotes"),
        ("\na: &a [*a]\n", "run.yaml:2: this value contains itself"),
    ],
)
def test_keys_that_would_be_lost(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in error_of(load_config, tmp_path / "run.yaml")


def test_merged_keys_are_not_given_twice(tmp_path):
    """YAML's own `<<` lets a mapping change what it merges; both copies can be changed alone afterwards."""
    text = "a: &a {b: {c: 1}, d: 2}\ne: {<<: *a, d: 3}\nf: *a\n"
    parsed = parse_yaml(text, "x")
    assert parsed.value == yaml.safe_load(text)
    parsed.value["a"]["b"]["c"] = 9
    assert parsed.value["e"]["b"]["c"] == parsed.value["f"]["b"]["c"] == 1


def test_a_key_given_twice_on_the_command_line(load):
    message = error_of(load, "optim={lr: 1.0, lr: 2.0}")
    assert message == "override optim={lr: 1.0, lr: 2.0}: the value: key lr is given twice; remove one"


def test_wrong_values_name_file_and_line(raw, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{yaml.safe_dump(raw, default_flow_style=None)}log:\n  every: x\n  evry: 3\n")
    line = (tmp_path / "run.yaml").read_text().splitlines().index("  every: x") + 1
    message = error_of(load_config, tmp_path / "run.yaml", ["data.stream={path: a, tokenizer: b, data_files: 3}"])
    assert f"{tmp_path / 'run.yaml'}:{line}: key log.every = 'x': should be a valid integer" in message
    assert f"{tmp_path / 'run.yaml'}:{line + 1}: unknown key log.evry" in message
    both = "should be a valid string or should be a valid list"
    assert f"command line: key data.stream.data_files = 3: {both}" in message


def test_dump_is_the_whole_configuration(load, tmp_path):
    config = load("optim.lr=3e-7", "data.corpora=[]", "data.stream={path: json, tokenizer: t, data_files: [x, y]}")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config(tmp_path / "again.yaml") == config


# --- the model's JSON -------------------------------------------------------------------------------------------------

MODEL = {"model_type": "lrnn", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}


def model_error(tmp_path, changes) -> str:
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, **changes}))
    message = error_of(load_model_config, tmp_path / "model.json")
    assert f"model configuration {tmp_path / 'model.json'}" in message
    return message


def test_model_is_what_the_file_says(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({**MODEL, "allow_neg_eigval": False, "norm_eps": 1e-5}))
    model = load_model_config(tmp_path / "model.json")
    assert (model.vocab_size, model.num_heads, model.allow_neg_eigval, model.norm_eps) == (400, 2, False, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 32}, "unknown field hidden; did you mean hidden_size?"),
        ({"num_head": 2}, "unknown field num_head; did you mean num_heads?"),
        ({"zzz": 1}, "unknown field zzz; valid: vocab_size, hidden_size"),
        ({"model_type": "llama"}, "model_type 'llama' should be 'lrnn'"),
        ({"mixer": "mamba3"}, f"mixer 'mamba3' is not one of {', '.join(MIXERS)}"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer; got 0"),
        ({"hidden_size": "32"}, "hidden_size = '32' should be int"),
        ({"vocab_size": True}, "vocab_size = True should be int"),
        ({"allow_neg_eigval": "false"}, "allow_neg_eigval = 'false' should be bool"),
        ({"allow_neg_eigval": 0}, "allow_neg_eigval = 0 should be bool"),
        ({"norm_eps": "1e-6"}, "norm_eps = '1e-6' should be float"),
        ({"norm_eps": math.nan}, "norm_eps = nan should be a finite number"),
        ({"norm_eps": -1e-6}, "norm_eps must be a number that is not negative; got -1e-06"),
        ({"initializer_range": -0.02}, "initializer_range must be a number that is not negative; got -0.02"),
        ({"initializer_range": math.inf}, "initializer_range = inf should be a finite number"),
        ({"initializer_range": None}, "initializer_range = None should be float"),
        ({"max_position_embeddings": 512.5}, "max_position_embeddings = 512.5 should be int"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' should be bool"),
    ],
)
def test_bad_model(tmp_path, changes, message):
    assert message in model_error(tmp_path, changes)


def test_model_file_of_a_saved_model_is_accepted(tmp_path):
    LrnnConfig(vocab_size=400, hidden_size=32).save_pretrained(tmp_path)
    assert load_model_config(tmp_path / "config.json").hidden_size == 32


def test_model_file_itself(tmp_path):
    assert "model.json does not exist" in error_of(load_model_config, tmp_path / "model.json")
    (tmp_path / "model.json").write_text('{"a": 1,}')
    assert "model.json is not JSON" in error_of(load_model_config, tmp_path / "model.json")
    (tmp_path / "model.json").write_text('{"vocab_size": 4, "hidden_size": 2,\n "vocab_size": 5}')
    message = error_of(load_model_config, tmp_path / "model.json")
    assert "model.json:2: key vocab_size is given twice, first in line 1; remove one" in message
    (tmp_path / "model.json").write_text("[1]")
    assert "should hold a JSON object, not list" in error_of(load_model_config, tmp_path / "model.json")
    (tmp_path / "folder").mkdir()
    assert "folder cannot be read" in error_of(load_model_config, tmp_path / "folder")


# --- DeepSpeed's JSON -------------------------------------------------------------------------------------------------

ZERO = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def deepspeed(load, tmp_path):
    """`deepspeed(changes, world_size)` returns the settings made from a JSON with these changes."""

    def make(changes: dict, world_size: int = 1) -> dict:
        (tmp_path / "zero.json").write_text(json.dumps({**ZERO, **changes}))
        return deepspeed_config(load("zero=", f"deepspeed={tmp_path / 'zero.json'}"), world_size)

    return make


def test_deepspeed_batch_sizes(deepspeed):
    settings = deepspeed({"gradient_clipping": 0.5}, world_size=2)
    assert settings["gradient_clipping"] == 0.5 and settings["zero_optimization"] == {"stage": 2}
    assert settings["train_batch_size"] == 8 and settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"bf16": {"enabled": True}},
            ["bf16.enabled casts A_log and dt_bias too", '"torch_autocast": {"enabled": true'],
        ),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "torch_autocast"]),
        ({"bf16": True}, ["bf16 is True", "JSON object"]),
        ({"zero_optimization": 2}, ["zero_optimization is 2", "JSON object"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer is set by the run's configuration (optim, schedule), remove it"]),
        ({"scheduler": {}}, ["scheduler is set by", "remove it"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage is 0; 1, 2 and 3 are supported"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage is 0"]),
        ({"zero_optimization": {"stage": "2"}}, ["zero_optimization.stage is '2'; 1, 2 and 3"]),
        (
            {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            ["torch_autocast.lower_precision_safe_modules must be [], for float32 reduction"],
        ),
        (
            {"torch_autocast": {"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linear"]}},
            ["torch_autocast.lower_precision_safe_modules must be []"],
        ),
    ],
)
def test_bad_deepspeed(deepspeed, tmp_path, changes, parts):
    message = error_of(deepspeed, changes)
    assert str(tmp_path / "zero.json") in message
    assert all(part in message for part in parts), message


def test_precision(load, tmp_path):
    assert deepspeed_config(load(), 1)["torch_autocast"]["dtype"] == "bfloat16"
    assert "torch_autocast" not in deepspeed_config(load("precision=float32"), 1)
    (tmp_path / "autocast.json").write_text(json.dumps({**zero_settings(2), "steps_per_print": 5}))
    config = load("zero=", f"deepspeed={tmp_path / 'autocast.json'}", "precision=float32")
    message = error_of(deepspeed_config, config, 1)
    assert "torch_autocast means bfloat16, and precision of the run's configuration is float32" in message


def test_disabled_modes_are_fine(deepspeed):
    deepspeed({"bf16": {"enabled": False}, "torch_autocast": {"enabled": False}})


def test_batches_that_processes_cannot_share(deepspeed):
    assert "global_batch_size=8 has too few samples for 5 processes" in error_of(deepspeed, {}, 5)
    assert "global_batch_size=8 is not a multiple of micro_batch_size=2 times 3 processes" in error_of(deepspeed, {}, 3)


def test_what_trains_with_fused_layers(load):
    def fused(*overrides: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> bool:
        return uses_fused_layers(load(*overrides), torch.device(device), dtype)

    assert fused() and not fused(device="cpu") and not fused(dtype=torch.float32)
    assert fused("fused_layers=true", dtype=torch.float32) and not fused("fused_layers=false")
    assert fused("activation_checkpointing=mlp")
    on_cpu = error_of(lambda: fused("fused_layers=true", device="cpu"))
    assert on_cpu.startswith("fused_layers is true, but they run on GPUs alone")
    for name in ("bfloat16", "bf16", "float16"):
        dtype = torch.float16 if name == "float16" else torch.bfloat16
        assert compute_dtype({"torch_autocast": {"enabled": True, "dtype": name}}) == dtype
    assert compute_dtype({"torch_autocast": {"enabled": True}}) == torch.bfloat16
    assert compute_dtype({"torch_autocast": {"enabled": False, "dtype": "float16"}}) == torch.float32
    mlp = error_of(lambda: fused("activation_checkpointing=mlp", device="cpu"))
    assert mlp.startswith("activation_checkpointing is 'mlp', which only fused layers can do")


@pytest.mark.parametrize(
    ("overrides", "device", "dtype", "reason"),
    [
        ((), "cpu", torch.bfloat16, "here the device is cpu, layers are plain"),
        (("fused_layers=false",), "cuda", torch.bfloat16, "here the device is cuda, layers are plain"),
        (("fused_layers=true",), "cuda", torch.float16, "layers are fused, and modules compute in float16"),
        ((), "cuda", torch.bfloat16, "takes compute capability 8.9 or above; A100 has 8.0"),
    ],
)
def test_float8_that_cannot_be_had(load, monkeypatch, overrides, device, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    config = load("precision=fp8", *overrides)
    message = error_of(uses_fused_layers, config, torch.device(device), dtype)
    assert message.startswith("precision is 'fp8', which takes ") and reason in message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert uses_fused_layers(load("precision=fp8"), torch.device("cuda"), torch.bfloat16)


def test_float8_computes_the_rest_in_bfloat16(load, tmp_path):
    assert compute_dtype(deepspeed_config(load("precision=fp8"), 1)) == torch.bfloat16
    for autocast in (True, False):
        path = tmp_path / f"{autocast}.json"
        path.write_text(json.dumps(zero_settings(2, "bfloat16" if autocast else "float32")))
        config = load("zero=", f"deepspeed={path}", "precision=fp8")
        if autocast:
            assert compute_dtype(deepspeed_config(config, 1)) == torch.bfloat16
        else:
            message = error_of(deepspeed_config, config, 1)
            assert "torch_autocast means float32, and precision of the run's configuration is fp8" in message
