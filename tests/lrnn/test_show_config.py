"""Test `lrnn config`: the whole configuration with where each value was written, and the schemas for editors."""

import json
from pathlib import Path

import pytest
import yaml

from lrnn.cli import main
from lrnn.config_schema import KINDS, json_schema, sections
from lrnn.ladder.cells import load_ladder
from lrnn.ladder.config import LadderConfig
from lrnn.model_config import load_model_config
from lrnn.pretrain.config import Config, load_config, load_model_of
from lrnn.show_config import kind_of
from lrnn.track.grid import GridConfig, load_grid

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs/models/tiny.json"


@pytest.fixture
def show(capsys):
    """`show(*arguments)` returns what `lrnn config` prints."""

    def show(*arguments: object) -> str:
        assert main(["config", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return show


def comment(text: str, key: str) -> str:
    lines = [line for line in text.splitlines() if line.strip().removeprefix("- ").startswith(f"{key}:")]
    depth = min(len(line) - len(line.lstrip()) for line in lines)  # `profile` has `steps` too, `optim.muon` has `lr`
    (line,) = [line for line in lines if len(line) - len(line.lstrip()) == depth]
    return line.split("  # ")[1]


@pytest.fixture
def run(tmp_path) -> Path:
    """Return run.yaml, which changes base.yaml."""
    base = {
        "run_dir": "x", "model": str(MODEL), "steps": 100, "global_batch_size": 8, "micro_batch_size": 2,
        "data": {"seq_len": 64, "corpora": [{"path": "a"}]}, "optim": {"lr": 0.001},
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim:\n  betas: [0.8, 0.9]\n")
    return tmp_path / "run.yaml"


def test_a_run(show, run, tmp_path):
    overrides = ["seed=3", "model.hidden_size=96", "model.num_heads=1"]
    text = show(run, *overrides)
    (tmp_path / "again.yaml").write_text(text)  # what is printed is a configuration
    first, again = load_config(run, overrides), load_config(tmp_path / "again.yaml")
    assert again.model_dump(exclude={"model"}) == first.model_dump(exclude={"model"})
    assert load_model_of(again).to_dict() == load_model_of(first).to_dict()
    lines = MODEL.read_text().splitlines()
    mixer = next(number for number, line in enumerate(lines, 1) if '"mixer"' in line)
    expected = {
        "betas": f"{run}:3", "lr": f"{run.with_name('base.yaml')}:11", "steps": f"{run.with_name('base.yaml')}:3",
        "seed": "command line", "hidden_size": "command line", "mixer": f"{MODEL}:{mixer}", "state_size": "default",
        "max_position_embeddings": "data.seq_len", "weight": "default", "weight_decay": "default",
        "path": f"{run.with_name('base.yaml')}:9",
    }  # fmt: skip
    assert {key: comment(text, key) for key in expected} == expected


def test_what_an_older_form_becomes(show, run):
    (run.parent / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    text = show(run, f"deepspeed={run.parent / 'zero1.json'}")
    assert comment(text, "clip") == "converted" and comment(text, "deepspeed") == "command line"


def test_a_grid(show, tmp_path):
    grid = ROOT / "configs/track/parity_small.yaml"
    text = show(grid, "seeds=[4]")
    (tmp_path / "again.yaml").write_text(text)
    first, again = load_grid(grid, ["seeds=[4]"])[0], load_grid(tmp_path / "again.yaml")[0]
    assert again.model_dump(exclude={"out"}) == first.model_dump(exclude={"out"})  # a path beside the file
    assert comment(text, "seeds") == "command line" and comment(text, "mixer").startswith(f"{grid}:")


def test_a_model(show, tmp_path):
    text = show(MODEL)
    (tmp_path / "again.json").write_text(json.dumps(yaml.safe_load(text)))
    assert load_model_config(tmp_path / "again.json").to_dict() == load_model_config(MODEL).to_dict()
    assert comment(text, "vocab_size") == f"{MODEL}:3" and comment(text, "use_cache") == "default"


def test_a_ladder(show, tmp_path):
    text = show("ranges", "sizes.15m.lr=0.001")
    (tmp_path / "again.yaml").write_text(text)
    first, again = load_ladder("ranges", ["sizes.15m.lr=0.001"])[1], load_ladder(tmp_path / "again.yaml")[1]
    assert [(cell.name, cell.settings) for cell in again] == [(cell.name, cell.settings) for cell in first]
    assert comment(text, "effect").startswith(str(ROOT / "lrnn/configs/ladder/ranges.yaml"))
    assert kind_of(str(tmp_path / "again.yaml")) == "ladder" and "lr: 0.001" in text


@pytest.mark.parametrize(("name", "kind"), [("tiny", "run"), ("parity_small", "grid"), ("ranges", "ladder")])
def test_names(show, name, kind):
    assert show(name).startswith(f"# {name}: a {kind} of lrnn ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the configuration to print, or --schema with one of run, grid, ladder, model"),
        (["none.yaml"], "configuration none.yaml does not exist"),
        (["tiny", "stps=3"], "command line: unknown key stps; did you mean steps?"),
        (["tiny", "model.hidden=3"], "unknown field hidden; did you mean hidden_size?"),
        ([str(MODEL), "hidden_size=3"], "is a model; give the run that uses it, and model.hidden_size=3"),
    ],
)
def test_what_is_wrong_is_refused(capsys, arguments, message):
    assert main(["config", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and message in output.err


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_description(show, kind):
    schema = json.loads(show("--schema", kind))
    assert schema == json_schema(kind) and schema["$schema"].startswith("https://json-schema.org/")
    objects = [schema, *schema.get("$defs", {}).values()]
    for properties in (found["properties"] for found in objects):
        for key, entry in properties.items():
            assert key == "model_type" or entry.get("description", "").endswith("."), key


@pytest.mark.parametrize(("kind", "section"), [("run", Config), ("grid", GridConfig), ("ladder", LadderConfig)])
def test_the_keys_are_those_that_are_read(kind, section):
    schema = json_schema(kind)
    for inner in sections(section):
        found = schema if inner is section else schema["$defs"][inner.__name__]
        assert set(found["properties"]) - {"base"} == set(inner.model_fields) and not found["additionalProperties"]
    assert "base" in schema["properties"] and "required" not in schema  # a base file may have the key


def test_a_ladder_has_the_keys_of_runs_where_it_takes_them():
    schema = json_schema("ladder")
    size = schema["$defs"]["SizeConfig"]["properties"]
    assert size["run"]["$ref"] == schema["properties"]["run"]["$ref"] == "#/$defs/Config"
    run = json_schema("run")
    assert set(schema["$defs"]["Config"]["properties"]) == set(run["properties"]) - {"base"}
    assert schema["$defs"]["OptimConfig"] == run["$defs"]["OptimConfig"]
    assert schema["$defs"]["LadderGrid"]["required"] == ["sizes", "arms"]


def test_types_bounds_and_units():
    schema = json_schema("run")
    steps, zero = schema["properties"]["steps"], schema["properties"]["zero"]
    assert steps == {
        "description": "Length of the run in optimizer steps. It is required without `stages`; with them it is the sum "
        "of their lengths, and may be left out. Unit: steps.", "exclusiveMinimum": 0, "type": "integer",
    }  # fmt: skip
    assert {"enum": [1, 2, 3], "type": "integer"} in zero["anyOf"]
    assert schema["$defs"]["CorpusSource"]["required"] == ["path"]  # lists are replaced, not merged
    text, fields = schema["properties"]["model"]["anyOf"]
    name, pattern = fields["properties"]["mixer"]["anyOf"]
    assert text == {"type": "string"} and {"gated_deltanet", "transformer"} <= set(name["enum"])
    entries = {entry["properties"]["mixer"]["enum"][0]: entry for entry in pattern["items"]["anyOf"][1:]}
    assert "state_size" in entries["mamba"]["properties"] and "state_size" not in entries["gla"]["properties"]
    assert fields["properties"]["hidden_size"]["type"] == "integer" and "base" in fields["properties"]
