"""Test files that are based on others, and models that are given in the YAML file or on the command line."""

import json
from pathlib import Path

import pytest
import yaml

from lrnn.errors import UserError
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.settings import resolve
from lrnn.track.grid import load_grid

MODEL = {"model_type": "lrnn", "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}


@pytest.fixture
def files(tmp_path) -> Path:
    """Return a folder with base.yaml, a whole run of the model in m.json."""
    run = {
        "run_dir": "runs/x", "model": str(tmp_path / "m.json"), "steps": 100, "global_batch_size": 8,
        "micro_batch_size": 2, "data": {"seq_len": 64, "corpora": [{"path": "a"}, {"path": "b"}]},
        "optim": {"lr": 0.001, "weight_decay": 0.1},
    }  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps(MODEL))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


@pytest.fixture
def load(files):
    """`load(text, *overrides)` writes run.yaml and reads it."""

    def load(text: str, *overrides: str) -> Config:
        (files / "run.yaml").write_text(text)
        return load_config(files / "run.yaml", overrides)

    return load


def error_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_changes_its_base_key_by_key(load, files):
    config = load("base: base.yaml\noptim: {lr: 2e-3}\ndata: {corpora: [{path: c}]}\n", "steps=7")
    assert (config.optim.lr, config.optim.weight_decay, config.data.seq_len, config.steps) == (2e-3, 0.1, 64, 7)
    assert [c.path for c in config.data.corpora] == [str(files / "c")]  # a list is replaced, not joined


def test_the_last_of_several_bases_counts(load, files):
    (files / "sub").mkdir()
    (files / "sub" / "longer.yaml").write_text("base: ../more.yaml\nsteps: 300\n")  # relative to its own file
    (files / "more.yaml").write_text("steps: 200\nseed: 5\noptim: {lr: 0.5}\n")
    config = load("base: [base.yaml, sub/longer.yaml]\nseed: 6\n")
    assert (config.steps, config.seed, config.optim.lr, config.optim.weight_decay) == (300, 6, 0.5, 0.1)
    assert load("base: [sub/longer.yaml, base.yaml]\n").optim.lr == 0.001


def test_variables_expand_in_the_path_of_a_base(load, files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    monkeypatch.setenv("SOMEWHERE", str(files))
    assert load("base: ~/base.yaml\n").steps == load("base: $SOMEWHERE/base.yaml\n").steps == 100


def test_every_value_knows_where_it_was_written(files):
    (files / "run.yaml").write_text("base: base.yaml\n\noptim:\n  lr: 2e-3\n")
    settings = resolve(Config, files / "run.yaml", ["seed=3", "model.num_heads=1"])
    lines = (files / "base.yaml").read_text().splitlines()
    assert settings.origins["optim", "lr"] == f"{files / 'run.yaml'}:4"
    assert (
        settings.origins["optim", "weight_decay"] == f"{files / 'base.yaml'}:{lines.index('  weight_decay: 0.1') + 1}"
    )
    assert settings.origins["seed",] == settings.origins["model", "num_heads"] == "command line"
    model = next(number for number, line in enumerate(lines, 1) if line.startswith("model:"))
    assert settings.origins["model", "base"] == f"{files / 'base.yaml'}:{model}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: none.yaml", "run.yaml:1: base configuration {0}/none.yaml does not exist"),
        ("seed: 1\nbase:", "run.yaml:2: base = None should be the path of a YAML file, or a list of such paths"),
        ("base: [base.yaml, 3]", "run.yaml:1: base = ['base.yaml', 3] should be the path of"),
        ("base: .", "run.yaml:1: base configuration {0} cannot be read (Is a directory)"),
        (
            "base: other.yaml",
            "other.yaml:1: base run.yaml leads back to itself: {0}/run.yaml -> {0}/other.yaml -> {0}/run",
        ),
        ("base: base.yaml\noptim: {lr: x}", "{0}/run.yaml:2: key optim.lr = 'x': should be a valid number"),
        (
            "base: base.yaml\nmodel: 3",
            "{0}/run.yaml:2: key model = 3: should be a valid string or should be a valid dict",
        ),
    ],
)
def test_bad_bases(load, files, text, message):
    (files / "other.yaml").write_text("base: run.yaml\n")
    assert message.format(files) in error_of(load, text)


def test_a_wrong_value_of_a_base_is_named_there(load, files):
    (files / "bad.yaml").write_text("seed: 1\nsteps: many\n")
    assert f"{files / 'bad.yaml'}:2: key steps = 'many'" in error_of(load, "base: [base.yaml, bad.yaml]\n")


def test_base_is_no_key_of_the_command_line(load):
    assert "override base=x.yaml: base is a key of files" in error_of(load, "base: base.yaml", "base=x.yaml")


def test_a_section_that_is_null_can_be_filled(load):
    config = load("base: base.yaml\noptim:\n", "optim.lr=1.0", "data.stream.path=json", "data.stream.tokenizer=t",
                  "data.corpora=[]")  # fmt: skip
    assert config.optim.lr == 1.0 and config.data.stream.path == "json"


def test_a_grid_has_bases_too(tmp_path):
    path = Path(__file__).parents[2] / "configs/track/parity_small.yaml"
    (tmp_path / "grid.yaml").write_text(f"base: {path}\nseeds: [8]\n")
    grid, cells = load_grid(tmp_path / "grid.yaml")
    assert grid.seeds == [8] and {cell.seed for cell in cells} == {8} and grid.train == load_grid(path)[0].train


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "fields"),
    [
        ("", ["model.num_heads=4", "model.mixer=deltanet"], {"num_heads": 4, "mixer": "deltanet"}),
        ("model: {num_heads: 4}", [], {"num_heads": 4}),
        ("model: {num_heads: 4}", ["model.num_heads=8", "model.norm_eps=1e-5"], {"num_heads": 8, "norm_eps": 1e-5}),
        ("model: {base: $/m.json, hidden_size: 64}", [], {"hidden_size": 64}),
        ("model: {num_heads: 4}", ["model=$/m.json"], {"num_heads": 2}),
        ("model: {num_heads: 4}", ["model.base=$/other.json"], {"num_heads": 4, "hidden_size": 16}),
    ],
)
def test_fields_of_a_model_change_its_file(load, files, text, overrides, fields):
    (files / "other.json").write_text(json.dumps(MODEL | {"hidden_size": 16}))
    config = load(f"base: base.yaml\n{text}".replace("$", str(files)), *(o.replace("$", str(files)) for o in overrides))
    found = load_model_of(config).to_dict()
    expected = MODEL | fields | {"max_position_embeddings": 64}
    assert {name: found[name] for name in expected} == expected


def test_a_model_without_a_file(load):
    fields = "{vocab_size: 300, num_heads: 4, head_dim: 8}"
    own = "run_dir: x\nsteps: 1\nglobal_batch_size: 1\nmicro_batch_size: 1\noptim: {lr: 1}\n"
    own += f"data: {{seq_len: 8, corpora: [{{path: a}}]}}\nmodel: {fields}"
    for config in (load("base: base.yaml", f"model={fields}"), load(own)):
        model = load_model_of(config)
        assert (model.vocab_size, model.num_heads, model.hidden_size) == (300, 4, 2048)  # the rest has its defaults


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden=4", "m.json with changed hidden: unknown field hidden; did you mean hidden_size?"),
        ("model.hidden_size=big", "m.json with changed hidden_size: hidden_size = 'big' should be int"),
        ("model={hidden: 4}", "model: unknown field hidden; did you mean hidden_size?"),
        ("model={base: none.json}", "model configuration none.json does not exist"),
        ("model={base: 3}", "key model.base = 3 should be the path of a JSON file"),
    ],
)
def test_bad_models(load, override, message):
    assert message in error_of(load_model_of, load("base: base.yaml", override))
